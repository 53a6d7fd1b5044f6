const AT_ONCE = 60;  // cards that are made before the reader scrolls on

const BAD = ["unreadable", "nothing_counts"];
const NO_FAULT = ["held_out", "unused"];
const faults = (row) => row.problems.filter(([kind]) => !NO_FAULT.includes(kind));

function startDataset(data) {
  const rows = data.rows.map((row, index) => ({ ...row, index, searched: [row.file, ...row.captions.map(([text]) => text)].join("\n").toLowerCase() }));
  page.replaceChildren(
    make("header", {}, datasetHead(data, rows)),
    navigation([["images", say("images")], ["data-section", say("data")]]),
    make("main", {},
      section("images", say("images"), imageList(data, rows)),
      section("data-section", say("data"), dataTables(data.data))),
    make("footer", {}, make("p", {}, say("footer"))),
  );
}

function datasetHead(data, rows) {
  const wrong = rows.filter((row) => faults(row).length).length;
  const uses = rows.reduce((sum, row) => sum + row.repeats, 0);
  const used = new Set(rows.filter((row) => row.repeats).map((row) => row.bucket));
  return [
    make("p", { class: "kicker" }, say("dataset_kicker")),
    make("h1", {}, [...new Set(data.subsets.map((one) => one.folder.split(/[\\/]/).pop()))].slice(0, 3).join(", ")),
    make("dl", { class: "figures" },
      figure(say("images"), number(rows.length), say("uses_an_epoch", { n: number(uses) })),
      figure(say("batches"), number(data.batches), say("an_epoch")),
      figure(say("buckets"), number(used.size)),
      figure(say("something_wrong"), number(wrong), wrong ? say("see_filter") : say("nothing_found")),
    ),
  ];
}

/* The list of images: search, filters, order; cards are made as the reader scrolls. */

const ORDERS = {
  listed: (row) => row.index,
  file_name: (row) => row.file.toLowerCase(),
  tokens: (row) => Math.max(...row.captions.map(([, count]) => count)),
  pixels: (row) => row.size[0] * row.size[1],
  shape: (row) => row.size[0] / row.size[1],
  repeats: (row) => row.repeats,
  faults: (row) => faults(row).length,
};

function imageList(data, rows) {
  const hasMasks = rows.some((row) => row.mask);
  const count = (test) => rows.reduce((sum, row) => sum + test(row), 0);
  const withCount = (words, test) => `${words} (${number(count(test))})`;
  const kinds = [...new Set(rows.flatMap((row) => row.problems.map(([kind]) => kind)))].sort();
  const search = make("input", { type: "search", id: "search", placeholder: say("search_hint"), oninput: () => list() });
  const problem = choice("problem", [["", say("all")], ["any", withCount(say("something_wrong"), (row) => faults(row).length > 0)],
    ...kinds.map((kind) => [kind, withCount(say(`is_${kind}`), (row) => row.problems.some(([one]) => one === kind))])], () => list());
  const bucket = choice("bucket", [["", say("all")], ...data.buckets.map(([width, height, dataset], index) =>
    [String(index), withCount(`${width} × ${height}${data.data.datasets.length > 1 ? ` · ${say("dataset_n", { n: dataset })}` : ""}`, (row) => row.bucket === index)])], () => list());
  const folder = choice("folder", [["", say("all")], ...data.subsets.map((one, index) => [String(index), withCount(one.folder, (row) => row.subset === index)])], () => list());
  const order = choice("order", Object.keys(ORDERS).map((key) => [key, say(`by_${key}`)]), () => list());
  const turn = make("button", { class: "button", type: "button", "aria-pressed": "false", onclick: () => {
    turn.setAttribute("aria-pressed", String(turn.getAttribute("aria-pressed") !== "true"));
    list();
  } }, say("reversed"));
  const masks = make("input", { type: "checkbox", id: "masks", checked: true, onchange: () => cards.classList.toggle("bare", !masks.checked) });
  const found = make("p", { class: "soft small number", role: "status" });
  const cards = make("div", { class: "cards" });
  const more = make("button", { class: "button", type: "button", onclick: () => grow() });
  let chosen = [], items = [], made = 0;

  const list = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    chosen = rows.filter((row) => words.every((word) => row.searched.includes(word))
      && (!problem.value || (problem.value === "any" ? faults(row).length : row.problems.some(([kind]) => kind === problem.value)))
      && (!bucket.value || row.bucket === Number(bucket.value)) && (!folder.value || row.subset === Number(folder.value)));
    const key = ORDERS[order.value];
    chosen.sort((a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : a.index - b.index));
    if (turn.getAttribute("aria-pressed") === "true") chosen.reverse();
    items = chosen.filter((row) => row.image).map((row) => largeView(data, row));
    found.textContent = chosen.length ? say("found", { n: number(chosen.length), all: number(rows.length) }) : say("none_found");
    cards.replaceChildren();
    made = 0;
    grow();
  };
  const grow = () => {
    const next = chosen.slice(made, made + AT_ONCE);
    made += next.length;
    cards.append(...next.map((row) => imageCard(data, row, () => enlarge(items, items.findIndex((item) => item.row === row)))));
    more.hidden = made >= chosen.length;
    more.textContent = say("show_more", { n: number(chosen.length - made) });
  };
  list();
  new IntersectionObserver((seen) => { if (seen.some((one) => one.isIntersecting)) grow(); }, { rootMargin: "1200px" }).observe(more);

  return [
    make("p", { class: "lead" }, say("about_images"), data.subsets.some((one) => one.varies.length) ? ` ${say("about_varying")}` : "", hasMasks ? ` ${say("about_masks")}` : ""),
    make("div", { class: "filters" },
      labelled("search", say("search"), search), labelled("problem", say("something_wrong"), problem), labelled("bucket", say("bucket"), bucket),
      data.subsets.length > 1 ? labelled("folder", say("folder"), folder) : null, labelled("order", say("order"), make("div", { class: "row" }, order, turn)),
      hasMasks ? make("div", { class: "row" }, masks, make("label", { for: "masks" }, say("show_masks"))) : null),
    found, cards, make("div", { class: "more" }, more),
  ];
}

const choice = (id, options, changed) => make("select", { id, onchange: changed }, options.map(([value, words]) => make("option", { value }, words)));
const labelled = (id, words, control) => make("div", { class: "field" }, make("label", { for: id, class: "soft small" }, words), control);

const source = (data, name) => `${data.folder}/${name}`;
const isTiny = (data, row) => Math.max(...data.buckets[row.bucket].slice(0, 2)) <= 128;
const altText = (row) => say("example_alt", { file: row.file, caption: row.captions[0][0] });

function imageCard(data, row, open) {
  const [width, height] = data.buckets[row.bucket];
  const frame = row.image ? make("button", { class: "frame layers", type: "button", onclick: open },
    picture(source(data, row.image), altText(row), isTiny(data, row), [width, height]), row.mask ? make("img", { class: "over", src: address(source(data, row.mask)), alt: "", loading: "lazy" }) : null)
    : make("div", { class: "frame empty" }, say("no_pixels"));
  return make("figure", {}, frame,
    make("p", { class: "facts small" }, make("span", { class: "file" }, row.file),
      make("span", { class: "soft number" }, `${width} × ${height} · ${row.repeats ? `× ${number(row.repeats)}` : say("never_used")}`)),
    captionPart(data, row, 1),
    problemList(row));
}

/** Captions, with what is cut off struck through and the tokens counted. */
function captionPart(data, row, most) {
  const limit = data.data.tokens ? data.data.tokens.limit : null;
  const one = ([text, count, read]) => make("p", { class: "caption" },
    text.slice(0, read) || (text ? "" : make("em", { class: "soft" }, say("empty_caption"))),
    read < text.length ? make("del", { title: say("cut_off") }, make("span", { class: "hidden" }, ` ${say("cut_off")}: `), text.slice(read)) : null,
    limit ? make("span", { class: `tokens number${count > limit ? " over-limit" : ""}` }, ` ${say("tokens_of", { n: number(count), limit: number(limit) })}`) : null);
  const rest = row.captions.slice(most);
  return make("figcaption", { class: "captions" }, row.captions.slice(0, most).map(one),
    rest.length ? make("details", {}, make("summary", { class: "small" }, say("other_uses", { n: rest.length })), rest.map(one)) : null);
}

function problemList(row) {
  if (!row.problems.length) return null;
  const kind = ([name]) => (BAD.includes(name) ? "bad" : NO_FAULT.includes(name) ? null : "warn");
  return make("ul", { class: "chips", "aria-label": say("something_wrong") }, row.problems.map((one) => make("li", { class: kind(one) }, problemText(one))));
}

function problemText([kind, value]) {
  const values = {
    enlarged: () => ({ n: number(value, 1) }), cut_away: () => ({ n: number(100 * value) }), too_long: () => ({ n: number(value[0] - value[1]) }),
    duplicate: () => ({ files: value.join(", ") }), unreadable: () => ({ reason: value }),
  };
  return say(`what_${kind}`, kind in values ? values[kind]() : {});
}

function largeView(data, row) {
  const subset = data.subsets[row.subset];
  const [width, height] = data.buckets[row.bucket];
  return {
    row, src: source(data, row.image), alt: altText(row), over: row.mask ? source(data, row.mask) : null, tiny: isTiny(data, row),
    link: subset.link === null || /^([/\\]|[A-Za-z]:)/.test(row.file) ? null : `${subset.link}/${row.file.replaceAll("\\", "/")}`,
    about: () => [
      make("p", { class: "facts" }, make("strong", {}, row.file), make("span", { class: "soft small number" },
        [say("from_to", { from: row.size.join(" × "), to: `${width} × ${height}` }), row.repeats ? `× ${number(row.repeats)}` : say("never_used"),
          row.counts === undefined ? "" : say("mask_counts", { n: number(100 * row.counts) }), subset.reg ? say("reg") : "",
          subset.varies.length ? say("varies", { names: subset.varies.join(", ") }) : ""].filter(Boolean).join(" · "))),
      captionPart(data, row, row.captions.length), problemList(row),
    ].filter(Boolean),
  };
}

begin(startDataset);
