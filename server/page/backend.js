// The backend that runs: the reason, the fallbacks and the checks of the probe. And the model that it runs.

import { count, el, plural } from "./dom.js";

const WEB = /^https:[/]{2}/;

export function backendPanel(backend, model) {
  if (!backend || !model) return null;
  const { name, requested, reason } = backend;
  const asked = requested === name ? "it was requested by name" : `the setting is ${requested}`;
  const failed = backend.checks.filter((check) => !check.passed);
  return [
    el("p", { class: "chosen" }, el("strong", {}, name), ` runs; ${asked}.`),
    el("p", { class: "reason" }, reason),
    ...fallbacks(backend.fallbacks),
    checks(backend.checks, failed),
    layers(backend),
    el(
      "dl",
      { class: "figures" },
      ...[
        ["Model", model.id],
        ["Licence", model.license ?? "not known"],
        ["Origin", originOf(model)],
        ["Device", backend.device],
        ["Profile", `${backend.profile}${backend.profile_reason ? `: ${backend.profile_reason}` : ""}`],
        ["Preset", backend.preset],
        ["BLAS", backend.blas.name],
      ].map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))),
    ),
  ];
}

/** A model's card can have any text here. Only an address of the web becomes a link. */
function originOf({ origin }) {
  if (!WEB.test(origin ?? "")) return origin ?? "not known";
  return el("a", { href: origin, rel: "noreferrer", target: "_blank" }, origin.replace(WEB, ""));
}

function fallbacks(found) {
  if (!found.length) return [];
  return [
    el("h3", {}, "Fallbacks"),
    el(
      "ul",
      { class: "fallbacks" },
      ...found.map(({ from, to, code, reason }) =>
        el("li", {}, el("span", { class: "step" }, `${from} → ${to}`), el("code", {}, code), el("p", {}, reason)),
      ),
    ),
  ];
}

function checks(all, failed) {
  const nPassed = all.length - failed.length;
  const summary = `${plural(all.length, "check")}: ${count(nPassed)} passed, ${count(failed.length)} failed`;
  return el(
    "details",
    { class: "checks", open: true },
    el("summary", {}, summary),
    el("ul", {}, ...[...failed, ...all.filter((check) => check.passed)].map(checkEntry)),
  );
}

function checkEntry({ check, passed, max_error: error, microseconds, reason }) {
  const measured = [
    error !== null && `error ${error === 0 ? 0 : error.toExponential(1)}`,
    microseconds !== null && `${count(Math.round(microseconds))} µs`,
  ].filter(Boolean);
  return el(
    "li",
    { class: passed ? "passed" : "failed" },
    el("span", { class: "verdict" }, passed ? "passed" : "failed"),
    el("span", { class: "name" }, check),
    measured.length ? el("span", { class: "measured" }, measured.join(", ")) : null,
    reason && el("p", {}, reason),
  );
}

function layers({ layers: all, layer_kinds: kinds, preset }) {
  const groups = [];
  for (const layer of all) {
    const last = groups.at(-1);
    if (last && last.reason === layer.reason && last.cache === layer.cache) last.to = layer.index;
    else groups.push({ from: layer.index, to: layer.index, ...layer });
  }
  const nCompressed = all.filter((layer) => layer.compressed).length;
  return el(
    "details",
    { class: "layers" },
    el("summary", {}, `${nCompressed} of ${plural(all.length, "layer")} compressed with ${preset}`),
    el(
      "ul",
      {},
      ...groups.map(({ from, to, cache, reason }) => {
        const which = from === to ? `${from}` : `${from} to ${to}`;
        return el("li", {}, el("span", { class: "step" }, which), `${cache}: ${reason}`);
      }),
      ...kinds.map(({ layers: kind, lanes, expanded, reason }) =>
        el(
          "li",
          {},
          `${kind}: ${lanes}`,
          expanded.length ? `, over expanded pages in ${expanded.join(", ")}` : "",
          reason ? ` (${reason})` : "",
        ),
      ),
    ),
  );
}
