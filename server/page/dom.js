// Elements and formatted numbers. Text becomes text nodes, never markup.

const SVG = "http://www.w3.org/2000/svg";

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

export function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

export const byId = (id) => document.getElementById(id);

/** Changes a text only if it differs, so that screen readers read nothing twice. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Puts the result of `draw` into `root` if `value` has changed since the last call. */
export function redraw(root, value, draw) {
  const key = JSON.stringify(value) ?? "";
  if (root.drawn === key) return;
  root.drawn = key;
  root.replaceChildren(...[draw()].flat().filter((child) => child != null));
}

const PLAIN = new Intl.NumberFormat("en");
const SHORT = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const SHARE = new Intl.NumberFormat("en", { maximumSignificantDigits: 2 });
const UNITS = ["bytes", "KiB", "MiB", "GiB", "TiB"];

export const count = (n) => PLAIN.format(n);

export const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;

export const percent = (share) => `${SHARE.format(share * 100)} %`;

export function bytes(n) {
  const power = n < 1 ? 0 : Math.min(UNITS.length - 1, Math.floor(Math.log2(n) / 10));
  return `${SHORT.format(n / 1024 ** power)} ${UNITS[power]}`;
}
