// The gallery of an audit: cells of label -> suggested class, rows of a cell, decisions, labels.csv.
const DROP = -1, SHOWN = 120;
const { names, ids, given, suggested, score, flagged } = data;

const [heat, list, cards, menu, all] = ["heat", "pairs", "cards", "class", "all"].map(at);
let cells = new Map(); // "given-suggested": places of rows, the least believed first
let rows = [], shown = 0, current = 0, cursor = [0, 0], opened = null;
let decisions = new Map(); // by id: a class, or DROP
try {
  decisions = new Map(JSON.parse(localStorage.getItem(data.key) || "[]"));
} catch { /* some browsers keep nothing for files: then a reload forgets */ }

const decided = row => decisions.has(ids[row]);
const choiceOf = row => decisions.get(ids[row]);
const percent = part => (part === null ? "?" : `${(100 * part).toFixed(part >= 0.01 && part <= 0.99 ? 0 : 1)}%`);
const pair = cell => cell.split("-").map(c => names[c]).join(" → ");
const count = (number, what) => `${number.toLocaleString("en")} ${what}${number === 1 ? "" : "s"}`;

function svg(tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function group() {
  cells = new Map();
  given.forEach((label, row) => {
    if (!flagged[row] && !all.checked) return;
    const cell = `${label}-${suggested[row]}`;
    if (!cells.has(cell)) cells.set(cell, []);
    cells.get(cell).push(row);
  });
  const order = [...cells].sort((a, b) => off(b[0]) - off(a[0]) || b[1].length - a[1].length);
  cells = new Map(order);
  drawHeat();
  drawList();
}

const off = cell => { const [label, other] = cell.split("-"); return label !== other; };

function drawHeat() {
  const many = names.length > 30, step = many ? 10 : 26;
  const widest = Math.max(...names.map(name => name.length));
  const room = many ? 2 : 8 + 7 * Math.min(12, widest), side = step * names.length, box = room + side + 4;
  const most = Math.max(1, ...[...cells].filter(([cell]) => off(cell)).map(([, found]) => found.length));
  heat.setAttribute("viewBox", `0 0 ${box} ${box}`);
  heat.style.maxWidth = `${1.6 * box}px`;
  heat.style.minWidth = many ? `${Math.min(900, 4.5 * names.length)}px` : "";
  heat.replaceChildren(svg("rect", { x: room, y: room, width: side, height: side, class: "ground" }));
  if (!many) names.forEach((name, c) => {
    const short = name.length > 12 ? `${name.slice(0, 11)}…` : name, middle = room + (c + 0.5) * step;
    heat.append(svg("text", { x: room - 5, y: middle + 4, "text-anchor": "end" }, short));
    const turned = { transform: `translate(${middle + 4} ${room - 5}) rotate(-90)` };
    heat.append(svg("text", widest > 2 ? turned : { x: middle, y: room - 5, "text-anchor": "middle" }, short));
  });
  for (const [cell, found] of cells) {
    const [row, column] = cell.split("-").map(Number), place = { x: room + column * step, y: room + row * step };
    const dark = off(cell) ? 0.15 + 0.85 * Math.sqrt(found.length / most) : 0.12;
    const drawn = svg("rect", { ...place, width: step, height: step, "data-cell": cell, class: off(cell) ? "off" : "on" });
    drawn.style.fillOpacity = dark;
    drawn.append(svg("title", {}, `${pair(cell)}: ${count(found.length, "row")}`));
    heat.append(drawn);
    if (many) continue;
    const middle = { x: place.x + step / 2, y: place.y + step / 2 + 4, "text-anchor": "middle" };
    const number = found.length > 999 ? `${Math.round(found.length / 1000)}k` : found.length;
    heat.append(svg("text", { ...middle, class: off(cell) && dark > 0.75 ? "number light" : "number" }, number));
  }
  heat.append(svg("rect", { width: step, height: step, class: "cursor" }));
  heat.dataset.room = room;
  heat.dataset.step = step;
  point(...cursor);
}

function point(row, column) {
  const inside = c => Math.min(names.length - 1, Math.max(0, c));
  cursor = [inside(row), inside(column)];
  const room = Number(heat.dataset.room), step = Number(heat.dataset.step), frame = heat.querySelector(".cursor");
  frame.setAttribute("x", room + cursor[1] * step);
  frame.setAttribute("y", room + cursor[0] * step);
  at("told").textContent = tell(cursor.join("-"));
}

const tell = cell => `label ${pair(cell)}: ${count((cells.get(cell) || []).length, "row")}`;

function drawList() {
  const entries = [...cells].slice(0, 300).map(([cell, found]) => {
    const done = found.filter(decided).length;
    const text = make("button", { onclick: () => open(cell) }, pair(cell), make("b", {}, `${done ? `${done} of ` : ""}${found.length}`));
    text.classList.toggle("done", done === found.length);
    text.setAttribute("aria-current", cell === opened);
    return make("li", {}, text);
  });
  list.replaceChildren(...entries);
  const total = flagged.filter(Boolean).length, done = flagged.filter((flag, row) => flag && decided(row)).length;
  at("progress").textContent = `${done.toLocaleString("en")} of ${total.toLocaleString("en")} flagged decided`;
}

function open(cell, focus = true) {
  opened = cell;
  point(...cell.split("-").map(Number));
  show(cells.get(cell) || [], tell(cell), focus);
  drawList();
}

function show(found, title, focus = true) {
  [rows, shown, current] = [found, 0, Math.max(0, found.findIndex(row => !decided(row)))];
  at("opened").textContent = title;
  cards.replaceChildren();
  grow(Math.max(SHOWN, current + 1));
  go(current, focus);
  if (focus) reveal();
}

function reveal() { // on a phone, where the gallery is further down
  if (matchMedia("(max-width: 52rem)").matches) at("opened").scrollIntoView();
}

function grow(by = SHOWN) {
  for (const end = Math.min(rows.length, shown + by); shown < end; shown++) {
    const place = shown, row = rows[place];
    const card = make("button", { className: "card", onclick: () => go(place), tabIndex: -1 });
    if (row < data.pictured) card.append(picture(row, data.aspect));
    else card.append(make("span", { className: "name" }, ids[row]));
    card.append(make("span", { className: "told" }));
    cards.append(card);
    mark(place);
  }
  at("more").hidden = shown === rows.length;
  at("more").textContent = `${rows.length - shown} more`;
}

// What a card says of a row: its probability to be right, or what was decided.
function mark(place) {
  const card = cards.children[place], row = rows[place], choice = choiceOf(row);
  const kind = !decided(row) ? "" : choice === DROP ? "drop" : choice === given[row] ? "keep" : "relabel";
  card.dataset.kind = kind;
  card.lastChild.textContent = { "": percent(score[row]), keep: "kept", drop: "dropped", relabel: `→ ${names[choice]}` }[kind];
  card.setAttribute("aria-label", `${ids[row]}, label ${names[given[row]]}, suggested ${names[suggested[row]]}, ${card.lastChild.textContent}`);
}

function go(place, focus = true) {
  if (place >= shown && shown < rows.length) grow();
  cards.children[current]?.setAttribute("tabindex", -1);
  cards.querySelector("[aria-current=true]")?.removeAttribute("aria-current");
  current = Math.min(rows.length - 1, Math.max(0, place));
  const card = cards.children[current], row = rows[current];
  at("one").replaceChildren();
  if (!card) return;
  card.tabIndex = 0;
  card.setAttribute("aria-current", true);
  if (focus) card.focus();
  const facts = [["label", names[given[row]]], ["suggested", names[suggested[row]]], ["label is right", percent(score[row])]];
  if (data.true && data.true[row] >= 0) facts.push(["truly", names[data.true[row]]]);
  if (data.weights) facts.push(["weights", data.weights.map(w => (w[row] === null ? "?" : w[row].toFixed(2))).join(" label, ") + " teacher"]);
  facts.push(["row", ids[row]]);
  if (row < data.pictured) at("one").append(picture(row, data.aspect));
  at("one").append(make("dl", {}, ...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])));
  at("relabel").textContent = `Relabel: ${names[suggested[row]]}`;
  menu.value = decided(row) && choiceOf(row) !== DROP ? choiceOf(row) : suggested[row];
}

function decide(choice) {
  const row = rows[current];
  if (row === undefined) return;
  if (choice === undefined) decisions.delete(ids[row]);
  else decisions.set(ids[row], choice);
  try {
    localStorage.setItem(data.key, JSON.stringify([...decisions]));
  } catch { /* see above */ }
  mark(current);
  drawList();
  go(choice === undefined ? current : current + 1);
}

const quoted = text => (/[",\r\n]|^\s|\s$/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

function labels() {
  const order = ids.map((_, row) => row).sort((a, b) => data.index[a] - data.index[b]);
  const label = row => { const choice = decided(row) ? choiceOf(row) : given[row]; return choice < 0 ? "" : quoted(names[choice]); };
  return ["id,label", ...order.map(row => `${quoted(ids[row])},${label(row)}`)].join("\n") + "\n";
}

function download() {
  const link = make("a", { href: URL.createObjectURL(new Blob([labels()], { type: "text/csv" })), download: "labels.csv" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

function next() {
  const order = [...cells.keys()], start = order.indexOf(opened);
  const left = place => cells.get(order[place % order.length]).some(row => !decided(row));
  for (let place = start + 1; place <= start + order.length; place++) if (left(place)) return open(order[place % order.length]);
}

const columns = () => [...cards.children].filter(card => card.offsetTop === cards.children[0].offsetTop).length;
const ACTIONS = {
  k: () => decide(given[rows[current]]), r: () => decide(suggested[rows[current]]), d: () => decide(DROP),
  u: () => decide(undefined), c: () => menu.focus(), n: next, m: () => heat.focus(), s: download,
};

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target === menu) return;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns() }[event.key];
  const digit = names.length <= 10 && /^\d$/.test(event.key) && Number(event.key) < names.length;
  if (step && cards.contains(event.target)) go(current + step);
  else if (digit) decide(Number(event.key));
  else if (ACTIONS[event.key]) ACTIONS[event.key]();
  else return;
  event.preventDefault();
});

heat.addEventListener("keydown", event => {
  const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (move) point(cursor[0] + move[0], cursor[1] + move[1]);
  else if (event.key === "Enter") open(cursor.join("-"));
  else return;
  event.preventDefault();
});
heat.addEventListener("click", event => {
  const box = heat.getBoundingClientRect(), scale = heat.viewBox.baseVal.width / box.width;
  const place = pixel => (pixel * scale - heat.dataset.room) / heat.dataset.step - 0.5;
  const [row, column] = [place(event.clientY - box.top), place(event.clientX - box.left)];
  const far = cell => Math.hypot(...cell.split("-").map((c, axis) => c - [row, column][axis]));
  const reach = (12 * scale) / heat.dataset.step; // small cells are hard to hit
  const near = [...cells.keys()].reduce((best, cell) => (far(cell) < far(best) ? cell : best), [row, column].map(Math.round).join("-"));
  if (far(near) < Math.max(0.75, reach)) open(near);
});
document.querySelectorAll("#bar [data-key]").forEach(button => (button.onclick = ACTIONS[button.dataset.key]));
menu.append(...names.map((name, c) => make("option", { value: c }, name === String(c) ? name : `${c}: ${name}`)));
menu.onchange = () => decide(Number(menu.value));
at("more").onclick = () => grow();
all.onchange = group;
cards.classList.toggle("texts", !data.pictured);
if (!flagged.includes(1)) all.checked = true;
group();
if (data.weights) {
  const wrong = row => (data.true ? data.true[row] >= 0 && data.true[row] !== given[row] : flagged[row]);
  const dots = { x: data.weights[0], y: data.weights[1], kind: ids.map((_, row) => Number(wrong(row))) };
  trustMap(at("map"), dots, found => {
    opened = null;
    drawList();
    show(found, `${count(found.length, "row")} in the frame`, false);
    reveal();
  });
}
if (cells.size) open(cells.keys().next().value, false);
