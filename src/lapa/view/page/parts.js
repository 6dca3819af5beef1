// What the scripts of all pages share.
"use strict";
const $ = id => document.getElementById(id);
const exported = document.documentElement.hasAttribute("data-exported");
const SVG = "http://www.w3.org/2000/svg";
const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
function drawn(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
function table(element, head, body) {
  const line = (cells, tag) => make("tr", {}, ...cells.map((cell, place) => make(tag,
    { textContent: cell, className: place ? "" : "text" })));
  element.replaceChildren(...(head ? [make("thead", {}, line(head, "th"))] : []),
    make("tbody", {}, ...body.map(cells => line(cells, "td"))));
}
const few = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const short = number => Number(number.toPrecision(3)).toString();
const duration = seconds => seconds >= 3600 ? `${few.format(seconds / 3600)} hours` : seconds >= 60
  ? `${few.format(seconds / 60)} minutes` : `${few.format(seconds)} s`;
const percent = share => `${few.format(100 * share)}%`;
const colour = code => code < 0 ? "#888" : `hsl(${(code * 137.5 + 205) % 360} 62% ${code % 2 ? 44 : 58}%)`;

// Data: by fetch from the server, as scripts from an export, which may be opened as a file.
const known = new Map(), waiting = new Map();
window.received = (name, value) => waiting.get(name)?.(value);
function load(name) {
  if (!known.has(name)) {
    known.set(name, exported ? asScript(name) : asJson(name));
    known.get(name).catch(() => known.delete(name));
    if (known.size > 200) known.delete(known.keys().next().value);
  }
  return known.get(name);
}
async function asJson(name) {
  const reply = await fetch(`data/${name}.json`);
  if (!reply.ok) throw new Error(await reply.text());
  return reply.json();
}
// What the server works out from the page's own data, such as an image.
async function ask(name, body) {
  const reply = await fetch(`ask/${name}`, { method: "POST", body: JSON.stringify(body) });
  if (!reply.ok) throw new Error(await reply.text());
  return reply.json();
}
function asScript(name) {
  return new Promise((done, failed) => {
    waiting.set(name, done);
    document.head.append(make("script", { src: `data/${name}.js`, onerror: () => failed(new Error(`no ${name}`)) }));
  });
}
// Of several that are loading, only the one that was asked for last may be shown: `const isShown = latest("episode")`, and
// after each `await`: `if (!isShown()) return`.
const turnOf = new Map();
function latest(kind) {
  const turn = (turnOf.get(kind) ?? 0) + 1;
  turnOf.set(kind, turn);
  return () => turnOf.get(kind) === turn;
}
function complain(error) {
  $("error").textContent = error.message;
  $("error").hidden = false;
}
// Also what is thrown before the first `await`, and by functions that are not async.
const guarded = work => async (...given) => {
  try { return await work(...given); } catch (error) { complain(error); }
};
