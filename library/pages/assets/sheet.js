function startSheet(data) {
  const { specs, networks, cells } = data;
  const drawn = cells.flat().filter((cell) => cell.copy);
  const items = drawn.map((cell) => ({ src: cell.file || cell.copy, link: cell.file, alt: sheetAlt(data, cell), tiny: isSmall(cell), about: () => about(data, cell) }));
  const same = (key) => (specs.every((spec) => spec[key] === specs[0][key]) ? specs[0][key] : null);
  const facts = [same("sampler"), same("steps") !== null && say("sampler_steps", { n: same("steps") }), same("scale") !== null && say("scale", { n: same("scale") }),
    same("seed") !== null && say("seed", { n: same("seed") })].filter(Boolean);
  const resize = () => grid.style.setProperty("--cell", `${size.value}px`);
  const size = make("input", { id: "size", type: "range", min: 96, max: 512, step: 8, value: fittingSize(cells[0].length), oninput: resize });
  const grid = make("div", { class: "scroll sheet" }, sheetTable(data, (cell) => enlarge(items, drawn.indexOf(cell))));
  resize();
  page.replaceChildren(
    make("header", {},
      make("p", { class: "kicker" }, say("sheet_kicker")),
      make("h1", {}, data.model),
      make("div", { class: "status" }, make("span", { class: "soft number" }, [say("images_n", { n: number(drawn.length) }), ...facts].join(" · ")))),
    make("main", {}, make("section", { "aria-label": say("images") },
      make("p", { class: "lead" }, say(networks ? "about_networks" : "about_seeds")),
      make("div", { class: "row" }, make("label", { for: "size", class: "soft small" }, say("image_size")), size), grid)),
    make("footer", {}, make("p", {}, say("sheet_footer"))),
  );
}

/** Pixels of an image with which all columns are seen, if it is not too small then. */
function fittingSize(columns) {
  const room = Math.min(innerWidth, 1216) - (innerWidth < 640 ? 150 : 310);
  return Math.max(128, Math.min(320, room / columns - 10));
}

const isSmall = (cell) => Math.max(...cell.size) <= 128;
const networkName = (data, cell) => (data.networks ? data.networks[cell.network] || say("no_network") : null);

function sheetTable(data, open) {
  const { specs, networks, cells } = data;
  const seeds = cells.map((row) => row.map((cell) => specs[cell.spec].seed));
  const alike = seeds.every((row) => String(row) === String(seeds[0]));
  const one = new Set(seeds.flat()).size === 1;
  const heads = cells[0].map((cell) => (networks ? networkName(data, cell) : alike && !one ? say("seed", { n: specs[cell.spec].seed }) : ""));
  const rowHead = (row, index) => {
    const spec = specs[row[0].spec];
    const seed = one || (!networks && alike) ? "" : say("seed", { n: networks ? spec.seed : seeds[index].join(", ") });
    return make("th", { scope: "row" }, make("span", {}, spec.prompt || say("empty_prompt")), seed ? make("span", { class: "soft small number" }, seed) : null);
  };
  return make("table", {},
    heads.some(Boolean) ? make("thead", {}, make("tr", {}, make("th", { scope: "col" }, say("prompt")), heads.map((head) => make("th", { scope: "col" }, head)))) : null,
    make("tbody", {}, cells.map((row, index) => make("tr", {}, rowHead(row, index), row.map((cell) => make("td", {}, sheetCell(data, cell, open)))))));
}

/** An image that tells what made it under the pointer and to the keyboard, and opens on a click. */
function sheetCell(data, cell, open) {
  if (!cell.copy) return make("span", { class: "frame empty" }, say("not_drawn"));
  const hint = make("div", { class: "hint", "aria-hidden": "true" }, about(data, cell));
  const button = make("button", { class: "frame", type: "button", onclick: () => open(cell) }, picture(cell.copy, sheetAlt(data, cell), isSmall(cell), cell.size));
  button.addEventListener("keydown", (event) => { if (event.key === "Escape") button.blur(); });
  return make("div", { class: "cell" }, button, hint);
}

const sheetAlt = (data, cell) => [data.specs[cell.spec].prompt || say("empty_prompt"), say("seed", { n: data.specs[cell.spec].seed }), networkName(data, cell)].filter(Boolean).join(", ");

function about(data, cell) {
  const spec = data.specs[cell.spec];
  const facts = [networkName(data, cell), say("seed", { n: spec.seed }), spec.sampler, say("sampler_steps", { n: spec.steps }), say("scale", { n: spec.scale })];
  return [make("p", {}, spec.prompt || say("empty_prompt")), spec.negative ? make("p", { class: "soft small" }, say("negative", { text: spec.negative })) : null,
    make("p", { class: "soft small number" }, facts.filter(Boolean).join(" · "))].filter(Boolean);
}

begin(startSheet);
