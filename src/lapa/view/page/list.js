// The list: of all rows, only those in sight are elements.
"use strict";
const HEIGHT = 48;
let about = null;
const rows = { index: [], length: [], instruction: [], source: [] };
let found = [], chosen = -1;

function matches(row) {
  const seconds = rows.length[row] / about.fps;
  const only = $("only").value, images = seen.get(rows.index[row]);
  return words($("search").value).every(word => rows.instruction[row].toLowerCase().includes(word))
    && words($("source").value).every(word => rows.source[row].toLowerCase().includes(word))
    && !($("shortest").value && seconds < Number($("shortest").value))
    && !($("longest").value && seconds > Number($("longest").value))
    && !(only === "bare" && rows.instruction[row])
    && !(only === "short" && seconds >= 1)
    && (!(only in MARKS) || marked(images, only))
    && !($("calmest").value && !(100 * images?.motion >= Number($("calmest").value)))
    && !($("liveliest").value && !(100 * images?.motion <= Number($("liveliest").value)));
}
const words = text => text.toLowerCase().split(/\s+/).filter(Boolean);
function filter() {
  found = [];
  for (let row = 0; row < rows.index.length; row++) if (matches(row)) found.push(row);
  $("count").textContent = `${found.length.toLocaleString("en")} of ${about.episodes.toLocaleString("en")} episodes`
    + (about.of_episodes > about.episodes ? ` (the dataset has ${about.of_episodes.toLocaleString("en")})` : "");
  $("rows").style.height = `${found.length * HEIGHT}px`;
  draw();
}
function draw() {
  const first = Math.max(0, Math.floor($("list").scrollTop / HEIGHT) - 3);
  const last = Math.min(found.length, first + Math.ceil($("list").clientHeight / HEIGHT) + 7);
  const items = [];
  for (let place = first; place < last; place++) {
    const row = found[place], selected = rows.index[row] === chosen;
    const item = make("div", { className: "item", id: `item-${rows.index[row]}` },
      make("b", { textContent: rows.instruction[row] || "(no instruction)" }),
      make("span", { textContent: `${rows.index[row]} · ${few.format(rows.length[row] / about.fps)} s`
        + (seen.get(rows.index[row])?.motion != null ? ` · motion ${percent(seen.get(rows.index[row]).motion)}` : "")
        + (rows.source[row] ? ` · ${rows.source[row]}` : "") }));
    item.setAttribute("role", "option");
    item.setAttribute("aria-selected", selected);
    item.setAttribute("aria-setsize", found.length);
    item.setAttribute("aria-posinset", place + 1);
    item.style.top = `${place * HEIGHT}px`;
    item.onclick = () => go(`episode-${rows.index[row]}`);
    items.push(item);
  }
  $("rows").replaceChildren(...items);
  if (chosen >= 0) $("list").setAttribute("aria-activedescendant", `item-${chosen}`);
}
function place() { return found.findIndex(row => rows.index[row] === chosen); }
function move(steps) {
  if (!found.length) return;
  const to = Math.min(found.length - 1, Math.max(0, place() + steps));
  const top = to * HEIGHT, list = $("list");
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top + HEIGHT - list.clientHeight;
  chosen = rows.index[found[to]];
  go(`episode-${chosen}`);
}
