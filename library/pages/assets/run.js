
function startRun(first) {
  let run = first;
  const host = (id) => make("div", { id: `${id}-content` });
  const hosts = Object.fromEntries(["head", "notes", "numbers", "files", "use"].map((id) => [id, host(id)]));
  const curves = curveSection();
  const samples = sampleSection();
  const main = make("main", {},
    curves.element,
    samples.element,
    section("files", say("files"), hosts.files, hosts.use),
    section("data-section", say("data"), dataPart(run.data)),
    section("settings", say("settings"), settingsPart(run)),
  );
  page.replaceChildren(
    make("header", {}, hosts.head, hosts.notes),
    navigation([["curves", say("curves")], ["samples", say("samples")], ["files", say("files")], ["data-section", say("data")], ["settings", say("settings")]]),
    main,
    make("footer", {}, make("p", {}, say("footer"))),
  );

  const update = (data) => {
    run = data;
    head(hosts.head, run);
    show(hosts.notes, [run.warnings, run.skipped], notes);
    curves.update(run);
    samples.update(run);
    show(hosts.files, run.files, filesPart);
    show(hosts.use, [run.lora, run.base, run.trigger, run.data.tags.slice(0, 8)], usePart);
  };
  update(run);
  setInterval(() => head(hosts.head, run), 5000);
  if (run.state === "running") refreshFrom(run.every, update, (data) => data.state !== "running");
}

function head(host, run) {
  const quiet = (Date.now() - run.written) / 1000;
  const lost = run.state === "running" && quiet > Math.max(120, 20 * run.every);
  const ended = { finished: "finished", early: "warn", interrupted: "warn", failed: "bad" };
  const facts = [say("step_of", { step: number(run.step), steps: number(run.steps) }), say("epoch_of", { epoch: run.epoch, epochs: run.epochs })];
  if (run.state === "running" && !lost && run.left !== null) facts.push(say("left", { time: duration(run.left) }));
  if (run.state === "running") facts.push(lost ? say("lost", { time: duration(quiet) }) : say("updated", { time: duration(quiet) }));
  else facts.push(say("ended", { time: when(run.written) }));
  show(host, [facts, run.state, run.average, run.best, run.files.length, run.speed], () => [
    make("p", { class: "kicker" }, say("kicker", { model: run.model, kind: run.model_title })),
    make("h1", {}, run.name),
    make("div", { class: "status" },
      make("span", { class: `pill ${lost ? "warn" : ended[run.state] || "running"}`, role: "status" }, say(lost ? "no_news" : run.state)),
      facts.map((fact) => make("span", { class: "soft number" }, fact))),
    run.state === "failed" && run.reason ? make("div", { class: "callout bad" }, run.reason) : null,
    make("progress", { max: run.steps, value: run.step, "aria-label": say("progress") }),
    make("dl", { class: "figures" },
      figure(say("loss"), precise(run.average), say("last_epoch")),
      run.best ? figure(say("best_validation"), precise(run.best[1]), say("after_step", { step: number(run.best[0]) })) : null,
      run.speed ? figure(say("speed"), run.speed < 1 ? say("per_second", { n: precise(1 / run.speed) }) : say("per_step", { n: precise(run.speed) }), say("with_all")) : null,
      figure(say("images"), number(run.data.datasets.reduce((sum, one) => sum + one.subsets.reduce((all, part) => all + (part.reg ? 0 : part.images), 0), 0)), say("uses_an_epoch", { n: number(run.data.datasets.reduce((sum, one) => sum + one.images, 0)) })),
      run.memory ? figure(say("memory"), `${number(run.memory / 2 ** 30, 2)} GiB`, say("peak")) : null,
    ),
  ]);
}

function notes([warnings, skipped]) {
  const lines = [...warnings, ...(skipped ? [say("skipped", { n: skipped })] : [])];
  if (!lines.length) return [];
  return make("div", { class: "callout" }, make("h2", {}, say("warnings")), make("ul", {}, lines.map((line) => make("li", {}, line))));
}

/* Curves: plotly draws them; without it there is a table. */

function curveSection() {
  const chart = make("div", { id: "chart", role: "img" });
  const about = make("p", { class: "lead" });
  const missing = make("p", { class: "callout", hidden: true }, say("no_chart"));
  const rows = make("div", {});
  const details = make("details", {}, make("summary", {}, say("numbers")), rows);
  const buttons = [["all", 0], ["last_half", 0.5], ["last_tenth", 0.9]].map(([key, from]) =>
    make("button", { class: "button", type: "button", "aria-pressed": String(from === 0), onclick: () => zoom(from) }, say(key)));
  const tools = make("div", { class: "row", role: "group", "aria-label": say("zoom") }, buttons);
  const element = section("curves", say("curves"), about, tools, missing, chart, details);
  let run, asked = false, from = 0;

  const zoom = (share) => {
    from = share;
    buttons.forEach((button, index) => button.setAttribute("aria-pressed", String([0, 0.5, 0.9][index] === share)));
    if (!window.Plotly) return;
    if (share) Plotly.relayout(chart, { "xaxis.range": [run.step * share, run.step], "yaxis.autorange": true, "yaxis2.autorange": true });
    else Plotly.relayout(chart, { "xaxis.autorange": true, "yaxis.autorange": true, "yaxis2.autorange": true });
  };
  const draw = () => {
    if (!window.Plotly || !run.batches) return;
    const phone = matchMedia("(max-width: 40rem)").matches;
    Plotly.react(chart, tracesOf(run), layoutOf(run, phone), {
      responsive: true, displaylogo: false, displayModeBar: phone ? false : "hover", doubleClick: "reset",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "toImage", "autoScale2d", "sendChartToCloud"], plotlyServerURL: "",
    }).then(() => { if (from) zoom(from); });
  };
  const load = () => {
    if (asked) return;
    asked = true;
    if (!run.chart) return fail();
    document.head.append(make("script", { src: address(run.chart), onload: draw, onerror: fail }));
  };
  const fail = () => { missing.hidden = false; chart.hidden = true; tools.hidden = true; details.open = true; };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  matchMedia("(max-width: 40rem)").addEventListener("change", draw);

  return { element, update: (data) => {
    run = data;
    const thinned = run.raw[0].length < run.batches ? say("thinned", { n: number(run.batches), points: number(run.raw[0].length) }) : "";
    about.textContent = run.batches ? `${say("about_curves", { n: run.smoothing })} ${thinned}`.trim() : say("no_losses");
    chart.setAttribute("aria-label", run.batches ? say("chart_alt", {
      first: precise(run.mean[1][0]), last: precise(run.mean[1].at(-1)), steps: number(run.step) }) : say("no_losses"));
    show(rows, [run.mean, run.validation], numbersTable);
    load();
    draw();
  } };
}

function tracesOf(run) {
  const line = (curve, name, color, width, more = {}) => ({ x: curve[0], y: curve[1], name, mode: "lines", line: { color, width }, ...more });
  const colours = [style("--second"), "#7a6bb0", "#4f8f5b", "#b08a2e", "#b0527f", "#4a78b5", "#8a8f3a", "#6f6f6f"];
  return [
    line(run.raw, say("each_batch"), style("--pale"), 1, { hoverinfo: "skip" }),
    line(run.mean, say("mean_of", { n: run.smoothing }), style("--accent"), 2.4),
    ...run.parts.map((part, index) => line(part.curve, say("dataset_n", { n: part.number }), colours[(index + 1) % colours.length], 1.6)),
    ...(run.validation.length ? [{ x: run.validation.map((one) => one[0]), y: run.validation.map((one) => one[1]), name: say("validation"),
      mode: "lines+markers", line: { color: style("--second"), width: 1.8, dash: "dot" }, marker: { size: 6 } }] : []),
    ...run.rates.map((rate, index) => line(rate.curve, `${say("rate")}: ${rate.names.slice(0, 3).join(", ")}${rate.names.length > 3 ? " …" : ""}`,
      colours[(index + 5) % colours.length], 1.5, { yaxis: "y2", line: { color: colours[(index + 5) % colours.length], width: 1.5, shape: "hv" } })),
  ];
}

function layoutOf(run, phone) {
  const axis = { gridcolor: style("--line"), zeroline: false, linecolor: style("--line"), tickfont: { size: 12 }, automargin: true };
  const title = (text) => ({ text, font: { size: 13, color: style("--soft") }, standoff: 8 });
  return {
    height: phone ? 460 : 520, margin: { l: phone ? 44 : 56, r: phone ? 8 : 12, t: 10, b: 40 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, color: style("--ink"), size: 13 },
    hovermode: "x unified", hoverlabel: { bgcolor: style("--card"), bordercolor: style("--line"), font: { color: style("--ink") } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: style("--soft"), activecolor: style("--accent") },
    dragmode: phone ? false : "zoom", uirevision: "run",
    legend: { orientation: "h", x: 0, y: -0.14, font: { size: 12.5 } },
    xaxis: { ...axis, title: title(say("step")), anchor: "y2", tickformat: ",d" },
    yaxis: { ...axis, title: phone ? undefined : title(say("loss")), domain: [0.34, 1] },
    yaxis2: { ...axis, title: phone ? undefined : title(say("rate")), domain: [0, 0.24], rangemode: "tozero", exponentformat: "e", nticks: 4 },
  };
}

function numbersTable([mean, validation]) {
  const count = Math.min(mean[0].length, 24);
  const chosen = Array.from({ length: count }, (_, place) => Math.round(place * (mean[0].length - 1) / Math.max(1, count - 1)));
  const rows = chosen.map((index) => [number(mean[0][index]), precise(mean[1][index])]);
  const parts = [table([[say("step"), ""], [say("mean"), "right"]], rows, { caption: say("mean_caption") })];
  if (validation.length) {
    parts.push(table([[say("step"), ""], [say("validation"), "right"]], validation.slice(-24).map(([step, loss]) => [number(step), precise(loss)]), { caption: say("validation_caption") }));
  }
  return make("div", { class: "two" }, parts);
}

/* Sample images: one slider over the steps moves all prompts. */

function sampleSection() {
  const area = make("div", {});
  const element = section("samples", say("samples"), area);
  let at = null, atEnd = true;
  return { element, update: (run) => show(area, run.samples, (samples) => {
    const { prompts, steps, images } = samples;
    if (!steps.length) return make("p", { class: "lead" }, say("no_samples"));
    if (atEnd || at === null || at >= steps.length) at = steps.length - 1;
    const shownPrompts = prompts.map((prompt, index) => ({ ...prompt, index })).filter((prompt) => steps.some((step) => images[step][prompt.index]));
    const cards = shownPrompts.map((prompt) => sampleCard(prompt, steps, images, (index) => { slider.value = index; go(index); }));
    const words = make("label", { for: "slider" });
    const slider = make("input", { id: "slider", type: "range", min: 0, max: steps.length - 1, step: 1, value: at, oninput: () => go(Number(slider.value)) });
    const go = (index) => {
      at = index;
      atEnd = index === steps.length - 1;
      words.textContent = say("at_step", { step: number(steps[index]) });
      slider.setAttribute("aria-valuetext", words.textContent);
      cards.forEach((card) => card.go(index));
    };
    slider.disabled = steps.length < 2;
    go(at);
    return [
      make("p", { class: "lead" }, say("about_samples", { n: steps.length })),
      make("div", { class: "timeline" }, words, slider),
      make("div", { class: `samples${cards.length < 4 ? " few" : ""}` }, cards.map((card) => card.element)),
    ];
  }) };
}

function sampleCard(prompt, steps, images, choose) {
  const tiny = Math.max(...prompt.size) <= 128;
  const there = steps.map((step) => images[step][prompt.index] || null);
  const alt = (index) => say("sample_alt", { step: number(steps[index]), prompt: prompt.text });
  const details = [prompt.negative ? say("negative", { text: prompt.negative }) : "", prompt.seed === null ? "" : say("seed", { n: prompt.seed }),
    `${prompt.sampler}, ${say("sampler_steps", { n: prompt.steps })}, ${say("scale", { n: prompt.scale })}, ${prompt.size.join(" × ")}`].filter(Boolean);
  const image = make("img", { class: tiny ? "tiny" : null, width: prompt.size[0], height: prompt.size[1], decoding: "async" });
  let at = 0;
  const items = steps.map((step, index) => there[index] && { index, src: there[index][0], link: there[index][1], tiny, alt: alt(index),
    about: () => [make("p", {}, `${say("at_step", { step: number(step) })} · ${prompt.text}`), make("p", { class: "soft small" }, details.join(" · "))] }).filter(Boolean);
  const frame = make("button", { class: "frame", type: "button", onclick: () => {
    const start = items.findIndex((item) => item.index === at);
    if (start >= 0) enlarge(items, start, (place) => choose(items[place].index));
  } }, image);
  const thumbs = steps.map((step, index) => make("button", { type: "button", "aria-label": say("at_step", { step: number(step) }), onclick: () => choose(index) },
    there[index] ? picture(there[index][0], "", tiny) : make("img", { alt: "", src: "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA=" }), make("span", { "aria-hidden": "true" }, number(step))));
  const strip = make("div", { class: "strip", role: "group", "aria-label": say("all_steps") }, thumbs);
  const element = make("figure", { title: details.join("\n") }, frame, steps.length > 1 ? strip : null, make("figcaption", {}, prompt.text || say("empty_prompt")));
  return { element, go: (index) => {
    at = index;
    if (there[index]) image.src = address(there[index][0]);
    image.alt = there[index] ? alt(index) : say("no_image");
    image.style.visibility = there[index] ? "" : "hidden";
    thumbs.forEach((thumb, place) => thumb.setAttribute("aria-current", String(place === index)));
    const thumb = thumbs[index];
    if (strip.isConnected) strip.scrollLeft = thumb.offsetLeft - strip.offsetLeft - strip.clientWidth / 2 + thumb.clientWidth / 2;
    else requestAnimationFrame(() => { strip.scrollLeft = strip.scrollWidth; });
  } };
}

/* Files, and how to use them. */

function filesPart(files) {
  if (!files.length) return make("p", { class: "lead" }, say("no_files"));
  const hasLoss = files.some((file) => file.loss !== null && file.loss !== undefined);
  const columns = [[say("file"), ""], [say("step"), "right"], [say("size"), "right"], ...(hasLoss ? [[say("validation"), "right"]] : [])];
  return table(columns, files.map((file) => [
    [make("a", { href: address(file.name), download: file.name }, file.name), file.best ? make("span", { class: "best" }, ` ★ ${say("best")}`) : null],
    number(file.step), fileSize(file.bytes), ...(hasLoss ? [precise(file.loss)] : []),
  ]));
}

function usePart([lora, base, trigger, tags]) {
  const stem = lora.replace(/\.[^.]+$/, "");
  const quoted = (text) => (/^[\w./\\:-]+$/.test(text) ? text : `"${text}"`);
  return make("div", { class: "block" },
    make("h3", {}, say("how_to_use")),
    make("p", {}, trigger ? say("trigger", { words: trigger }) : tags.length ? say("tags_known", { words: tags.map(([tag]) => tag).join(", ") }) : ""),
    make("div", { class: "two" },
      make("div", {}, make("h3", {}, "A1111 / Forge"), make("p", { class: "soft small" }, say("use_webui", { file: lora })), code(`<lora:${stem}:0.8>`)),
      make("div", {}, make("h3", {}, "ComfyUI"), make("p", { class: "soft small" }, say("use_comfy", { file: lora })), code(`models/loras/${lora}`)),
      make("div", {}, make("h3", {}, "Diffusers"), make("p", { class: "soft small" }, say("use_diffusers")), code(`pipe.load_lora_weights("${lora}")`)),
      make("div", {}, make("h3", {}, say("this_suite")), make("p", { class: "soft small" }, say("use_suite")),
        code(`python gen_img_diffusers.py --ckpt=${quoted(base)} --network_weights ${quoted(lora)} --outdir=images --prompt="a cat"`)),
    ));
}

/* What was trained. */

function dataPart(data) {
  const items = data.examples.map((one) => ({ src: one.src, alt: say("example_alt", { file: one.file, caption: one.caption }), tiny: Math.max(...one.size) <= 128,
    about: () => [make("p", {}, one.caption || say("empty_caption")), make("p", { class: "soft small" }, `${one.file} · ${one.size.join(" × ")}`)] }));
  return make("div", {},
    make("div", { class: "cards small" }, data.examples.map((one, index) => make("figure", {},
      make("button", { class: "frame", type: "button", onclick: () => enlarge(items, index) }, picture(one.src, items[index].alt, items[index].tiny)),
      make("figcaption", {}, one.caption || say("empty_caption"))))),
    data.examples.length ? make("p", { class: "soft small", style: "margin-top:0.8rem" }, say("about_examples")) : null,
    dataTables(data),
  );
}

function settingsPart(run) {
  return make("div", {},
    make("p", { class: "lead" }, run.network),
    table([[say("option"), "keep"], [say("value"), ""], [say("default"), "keep"], [say("meaning"), "wide-only"]], run.settings.map((one) =>
      [make("code", {}, `--${one.name}`), one.value, make("span", { class: "soft" }, one.default || say("unset")), make("span", { class: "soft small", lang: "en" }, one.help)]), { caption: say("about_settings") }),
    run.secrets.length ? make("p", { class: "soft small", style: "margin-top:0.6rem" }, say("secrets", { names: run.secrets.map((name) => `--${name}`).join(", ") })) : null,
    make("h3", { style: "margin:1.75rem 0 0" }, say("command")), code(run.command));
}

begin(startRun);
