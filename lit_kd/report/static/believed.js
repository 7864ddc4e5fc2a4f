// Of each method a histogram of label weights by epoch, and a trust map whose frame shows samples.

const SHOWN = 80, EDGE = 2; // cards; the largest weight of a histogram's last bin
let method = data[0];

function bars() {
  const kinds = method.histograms[at("epoch").value], bins = kinds[0].length;
  const used = 1 + method.histograms.flat().reduce((last, bin) => Math.max(last, bin.findLastIndex(n => n > 0)), 0);
  const shown = used > bins / 2 + 1 ? bins : bins / 2 + (used > bins / 2); // up to weight 1, unless there are larger ones
  const totals = kinds.map(bin => bin.reduce((sum, n) => sum + n, 0) || 1);
  const most = Math.max(...kinds.map((bin, k) => Math.max(...bin) / totals[k]));
  const [left, low, wide, high] = [50, 258, 410, 240], parts = [];
  const put = (tag, attributes, text = "") => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.textContent = text;
    parts.push(made);
  };
  kinds.forEach((bin, k) => bin.slice(0, shown).forEach((n, place) => {
    const tall = (high * n) / totals[k] / most;
    put("rect", { x: left + (place * wide) / shown, y: low - tall, width: wide / shown - 1, height: tall, fill: `var(--${k ? "wrong" : "right"})`, opacity: 0.65 });
  }));
  put("path", { d: `M ${left} ${low - high} V ${low} H ${left + wide}`, stroke: "currentColor", fill: "none" });
  for (let tick = 0; tick <= 4; tick++) {
    const weight = (tick / 4) * EDGE * (shown / bins);
    put("text", { x: left + (tick / 4) * wide, y: low + 16, "text-anchor": "middle" }, weight.toFixed(2) + (tick === 4 && weight === EDGE ? "+" : ""));
    put("text", { x: left - 5, y: low + 4 - (tick / 4) * high, "text-anchor": "end" }, `${(25 * tick * most).toFixed(most < 0.2 ? 1 : 0)}%`);
  }
  put("text", { x: left + wide / 2, y: low + 36, "text-anchor": "middle" }, "weight of the label");
  at("histogram").replaceChildren(...parts);
  at("when").textContent = `${Number(at("epoch").value) + 1} of ${method.histograms.length}`;
}

function show(places) {
  const lightest = places.sort((a, b) => method.x[a] - method.x[b]).slice(0, SHOWN);
  const of = lightest.length < places.length ? `, the ${SHOWN} with the lightest labels:` : ":";
  at("framed").textContent = `${places.length} samples in the frame${of}`;
  at("tiles").replaceChildren(...lightest.map(place => {
    const told = [method.told[place], `weight ${method.x[place].toFixed(2)}`];
    const card = make("span", { className: `card ${method.kind[place] ? "wrong" : ""}`, title: `sample ${method.row[place]}` });
    card.append(place < method.pictured ? picture(method.first + place, method.aspect) : make("span", {}, `#${method.row[place]}`));
    card.append(...told.map(text => make("span", {}, text)));
    return card;
  }));
}

function pick() {
  method = data[at("method").value];
  at("found").textContent = method.found;
  Object.assign(at("epoch"), { max: method.histograms.length - 1, value: method.histograms.length - 1 });
  bars();
  trustMap(at("map"), method, show);
  at("framed").textContent = "";
  at("tiles").replaceChildren();
}

at("method").append(...data.map((each, place) => make("option", { value: place }, each.method)));
at("method").onchange = pick;
at("epoch").oninput = bars;
pick();
