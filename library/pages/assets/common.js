"use strict";

const page = document.getElementById("page");
const isCopy = window.parent !== window;  // see `refreshFrom`

const languages = navigator.languages && navigator.languages.length ? navigator.languages : [navigator.language || "en"];
const language = languages.map((tag) => tag.slice(0, 2).toLowerCase()).find((tag) => tag in WORDS) || "en";
document.documentElement.lang = language === "zh" ? "zh-Hans" : language;

/** The words of a key in the reader's language, with {name} replaced by values. */
function say(key, values = {}) {
  const text = WORDS[language][key] ?? WORDS.en[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
}

/** An element. Children are elements or texts; a text is never read as markup. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** A path below the page's folder as an address. */
const address = (path) => path.split("/").map(encodeURIComponent).join("/");

const readData = () => JSON.parse(document.getElementById("data").textContent);
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const number = (value, digits = 0) => value.toLocaleString(document.documentElement.lang, { minimumFractionDigits: digits, maximumFractionDigits: digits });
const precise = (value) => (value === null || value === undefined ? "–" : Number(value).toPrecision(4));

function duration(seconds) {
  if (seconds < 90) return say("seconds", { n: Math.max(1, Math.round(seconds)) });
  if (seconds < 5400) return say("minutes", { n: Math.round(seconds / 60) });
  if (seconds < 172800) return say("hours", { n: number(seconds / 3600, 1) });
  return say("days", { n: number(seconds / 86400, 1) });
}

function fileSize(bytes) {
  return bytes < 1e6 ? `${number(bytes / 1e3, 0)} kB` : bytes < 1e9 ? `${number(bytes / 1e6, 1)} MB` : `${number(bytes / 1e9, 2)} GB`;
}

const when = (milliseconds) => new Date(milliseconds).toLocaleString(document.documentElement.lang, { dateStyle: "medium", timeStyle: "short" });

/** Replace the content of an element, unless it shows the same data already: a reader may be in the middle of it. */
const shown = new Map();
function show(host, data, draw) {
  const state = JSON.stringify(data);
  if (shown.get(host) === state) return;
  shown.set(host, state);
  host.replaceChildren(...[draw(data)].flat(Infinity).filter(Boolean));
}

/** A text to copy. */
function code(text) {
  const button = make("button", { class: "button", type: "button", onclick: async () => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {  // not allowed here: select it, so that the keyboard can
      getSelection().selectAllChildren(block);
      return;
    }
    button.textContent = say("copied");
    setTimeout(() => { button.textContent = say("copy"); }, 1500);
  } }, say("copy"));
  const block = make("pre", {}, text);
  return make("div", { class: "code" }, block, button);
}

/** An image that is loaded when it comes near. size: [width, height], so that its place is known before. */
function picture(source, alt, tiny = false, [width, height] = [null, null]) {
  return make("img", { src: address(source), alt, loading: "lazy", decoding: "async", class: tiny ? "tiny" : null, width, height });
}

/** A table. columns: [heading, class]; rows: arrays of cells; the first cell of a row heads it. */
function table(columns, rows, options = {}) {
  const cell = (content, index) => make(index ? "td" : "th", { class: columns[index][1] || null, scope: index ? null : "row" }, content);
  return make("div", { class: "scroll" }, make("table", { class: options.class || null },
    options.caption ? make("caption", {}, options.caption) : null,
    make("thead", {}, make("tr", {}, columns.map(([text, kind]) => make("th", { scope: "col", class: kind || null }, text)))),
    make("tbody", {}, rows.map((row) => make("tr", {}, row.map(cell))))));
}

const bar = (value, most, label) => make("progress", { max: Math.max(most, 1), value, "aria-label": label });

/**
 * A large view of one of several images. items: {src, alt, about, link?, over?, tiny?}; about() gives what stands below the image, link
 * is the original file, over an image to lay over it. moved(index) is called as the reader goes on.
 */
const dialog = make("dialog", {});
function enlarge(items, start, moved = () => {}) {
  let index = start;
  const image = make("img", {});
  const over = make("img", { class: "over", alt: "" });
  const about = make("div", { class: "about" });
  const place = make("span", { class: "soft small number" });
  const link = make("a", { target: "_blank", class: "small" }, say("original"));
  const go = (to) => {
    index = (to + items.length) % items.length;
    const item = items[index];
    image.src = address(item.src);
    image.alt = item.alt;
    image.className = item.tiny ? "tiny" : "";
    over.hidden = !item.over;
    if (item.over) over.src = address(item.over);
    about.replaceChildren(...[item.about()].flat());
    place.textContent = `${number(index + 1)} / ${number(items.length)}`;
    link.hidden = !item.link;
    if (item.link) link.href = address(item.link);
    moved(index);
  };
  const button = (words, action) => make("button", { class: "button", type: "button", onclick: action }, words);
  dialog.replaceChildren(
    make("div", { class: "view" }, make("div", { class: "layers" }, image, over)),
    make("div", { class: "under" }, about, make("div", { class: "row" },
      items.length > 1 ? [button(`← ${say("previous")}`, () => go(index - 1)), button(`${say("next")} →`, () => go(index + 1)), place] : null,
      link, button(say("close"), () => dialog.close()))));
  dialog.setAttribute("aria-label", say("enlarged"));
  dialog.onkeydown = (event) => {
    if (event.key === "ArrowLeft") go(index - 1);
    else if (event.key === "ArrowRight") go(index + 1);
    else return;
    event.preventDefault();
  };
  dialog.onclick = (event) => { if (event.target === dialog) dialog.close(); };
  go(start);
  if (!dialog.isConnected) document.body.append(dialog);
  dialog.showModal();
}

/** Folders, buckets, lengths of captions and tags of a dataset. */
function dataTables(data) {
  const several = data.datasets.length > 1;
  const folders = (one) => make("div", {}, make("h3", {}, several ? say("dataset_n", { n: one.number }) : say("folders")),
    table([[say("folder"), ""], [say("images"), "right"], [say("repeats"), "right"]], one.subsets.map((part) =>
      [[part.folder, part.reg ? make("span", { class: "soft" }, ` (${say("reg")})`) : null], number(part.images), `× ${part.repeats}`]),
      { caption: say("dataset_caption", { size: one.size.join(" × "), batch: one.batch }) + (one.held_out ? ` ${say("held_out", { n: number(one.held_out) })}` : "") }));
  const buckets = (one) => make("div", {}, make("h3", {}, say("buckets") + (several ? ` · ${say("dataset_n", { n: one.number })}` : "")),
    table([[say("bucket"), ""], [say("images"), "right"], [say("uses"), "right"], ["", "bar"]], one.buckets.map(([width, height, images, uses]) =>
      [`${width} × ${height}`, number(images), number(uses), bar(uses, Math.max(...one.buckets.map((bucket) => bucket[3])), `${width} × ${height}`)])));
  const tokens = ({ ranges, limit, longest, cut, counted, images }) => make("div", {}, make("h3", {}, say("token_lengths")),
    table([[say("tokens"), ""], [say("images"), "right"], ["", "bar"]], ranges.map(([from, to, count]) =>
      [`${from} – ${to}`, number(count), bar(count, Math.max(...ranges.map((range) => range[2])), `${from} – ${to}`)]),
      { caption: say("token_caption", { limit, longest, cut }) + (counted < images ? ` ${say("token_some", { n: number(counted), all: number(images) })}` : "") }));
  const tags = () => make("div", {}, make("h3", {}, say("tags")),
    make("ul", { class: "chips" }, data.tags.map(([tag, count]) => make("li", {}, `${tag} · ${number(count)}`))));
  return make("div", { class: "two" }, data.datasets.map(folders), data.datasets.map(buckets),
    data.tokens ? tokens(data.tokens) : null, data.tags.length ? tags() : null);
}

/** One of the large figures at the top. */
const figure = (name, value, under) => make("div", {}, make("dt", {}, name), make("dd", {}, value, under ? make("small", {}, under) : null));

function navigation(parts) {
  return make("nav", { "aria-label": say("contents") }, make("ul", {}, parts.map(([id, words]) => make("li", {}, make("a", { href: `#${id}` }, words)))));
}

function section(id, words, ...content) {
  return make("section", { id, "aria-labelledby": `${id}-title` }, make("h2", { id: `${id}-title` }, words), ...content);
}

/**
 * Ask now and then whether the page was rewritten. A page from the disk may not read files, but it may load itself once more in a
 * hidden frame; there it only sends its data to the page around it.
 */
function refreshFrom(seconds, update, isOver) {
  const ask = () => {
    if (document.hidden) return;
    const frame = make("iframe", { src: location.href.split("#")[0], hidden: true, title: "" });
    const end = () => { removeEventListener("message", take); frame.remove(); };
    const take = (event) => {
      if (event.source !== frame.contentWindow) return;
      end();
      update(event.data);
      if (isOver(event.data)) clearInterval(timer);
    };
    addEventListener("message", take);
    setTimeout(end, seconds * 900);
    document.body.append(frame);
  };
  const timer = setInterval(ask, seconds * 1000);
}

/** Show the page, or as the hidden copy hand over its data. */
function begin(start) {
  if (isCopy) parent.postMessage(readData(), "*");
  else start(readData());
}
