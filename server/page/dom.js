// Elements, and numbers as people read them. Text becomes text nodes, never markup.

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

/** Changes a text only if it is another one, so that nothing is read aloud twice. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Calls `draw` and puts what it returns into `root`, but only when `value` is not what it was the last time. */
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
