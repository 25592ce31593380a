"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const LEFT = 62, ROW = 32, AXIS = 20;
const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes and children; text is never taken for markup. */
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "rect", "text", "line", "g", "title"].includes(tag);
  const node = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** Seconds in the unit that suits a scale of so many seconds. */
function time(seconds, scale = Math.abs(seconds)) {
  const [unit, size] = scale >= 1 ? ["s", 1] : scale >= 1e-3 ? ["ms", 1e-3] : ["µs", 1e-6];
  const value = seconds / size;
  return `${value.toFixed(Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : 2)} ${unit}`;
}

function section(title, ...children) {
  return make("section", {}, make("h2", {}, title), ...children);
}

function list(sentences) {
  return make("ul", {}, ...sentences.map((text) => make("li", {}, text)));
}

// One operator is picked at a time, in the timelines and in the plan alike.
let picked = null;
const onPick = [];
function pick(strand, name) {
  const same = picked && picked.strand === strand && picked.name === name;
  picked = same || name === undefined ? null : { strand, name };
  onPick.forEach((update) => update());
}
const isPicked = (strand, name) => picked && picked.name === name && picked.strand === strand;

const tip = make("div", { id: "tip", hidden: "" });
function point(event, text) {
  tip.textContent = text;
  tip.hidden = !text;
  const left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(0, left)}px`;
  tip.style.top = `${Math.min(event.clientY + 14, window.innerHeight - tip.offsetHeight - 8)}px`;
}

/** What is shown of all timelines of a page: they move and zoom together. */
class Camera {
  constructor(views) {
    this.views = views;
    this.end = Math.max(...views.map((view) => view.end));
    this.draws = [];
    this.reset();
  }
  reset() { this.show(this.views.map((view) => view.window[0]), Math.max(...this.views.map((view) => view.window[1] - view.window[0]))); }
  whole() { this.show(this.views.map(() => 0), this.end); }
  show(starts, span) { [this.starts, this.span] = [starts, span]; this.draw(); }
  move(share) { this.show(this.starts.map((start) => start + share * this.span), this.span); }
  zoom(factor, at = 0.5) {
    const span = Math.min(this.end * 1.2, Math.max(this.end * 1e-6, this.span * factor));
    this.show(this.starts.map((start) => start + at * (this.span - span)), span);
  }
  draw() { this.draws.forEach((draw) => draw()); }
}

function timeline(view, number, camera) {
  const height = view.lanes.length * ROW + AXIS;
  const svg = make("svg", { class: "lanes", role: "img", tabindex: "0", height, "aria-label": `timeline: ${view.title}` });
  let width = 900;
  const bar = (event) => view.bars[event.target.dataset ? event.target.dataset.bar : -1];
  const draw = () => {
    const start = camera.starts[number], scale = (width - LEFT) / camera.span;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const nodes = [], names = [];
    view.lanes.forEach((lane, row) => {
      const from = Math.max(0, -start) * scale, to = Math.min(view.end - start, camera.span) * scale;
      if (to > from) nodes.push(make("rect", { class: "idle", x: LEFT + from, y: row * ROW + 2, width: to - from, height: ROW - 4 }));
      names.push(make("text", { x: 0, y: row * ROW + ROW / 2 + 4 }, lane));
    });
    // Bars that are narrower than a pixel are drawn once for all that would lie there.
    const drawn = view.lanes.map(() => -1);
    view.bars.forEach(([lane, strand, name, layer, batch, begin, length], index) => {
      const left = (begin - start) * scale, right = left + length * scale;
      if (right < 0 || left > width - LEFT || right < drawn[lane] + 0.6) return;
      drawn[lane] = right;
      const from = Math.max(0, left), to = Math.min(width - LEFT, right), wide = Math.max(0.6, to - from);
      const operator = view.names[name], kind = view.strands[strand];
      const gap = wide > 4 ? 1 : 0;
      nodes.push(make("rect", { class: kind + (isPicked(kind, operator) ? " picked" : ""), x: LEFT + from, y: lane * ROW + 2, width: wide - gap, height: ROW - 4, "data-bar": index }));
      if (operator.length * 6 + 4 < wide) nodes.push(make("text", { class: "name", x: LEFT + from + wide / 2, y: lane * ROW + ROW / 2 + 4 }, operator));
    });
    for (const share of [0, 0.25, 0.5, 0.75, 1]) {
      const anchor = share === 0 ? "start" : share === 1 ? "end" : "middle";
      nodes.push(make("text", { class: "tick", style: `text-anchor: ${anchor}`, x: LEFT + share * (width - LEFT), y: height - 5 }, time(start + share * camera.span, camera.span)));
    }
    svg.replaceChildren(...nodes, ...names);
  };
  let from = null, moved = false;
  svg.addEventListener("pointerdown", (event) => { from = event.clientX; moved = false; });
  window.addEventListener("pointerup", () => { from = null; });
  svg.addEventListener("pointermove", (event) => {
    if (from !== null && Math.abs(event.clientX - from) > 2) {
      camera.move((from - event.clientX) / (svg.clientWidth * (1 - LEFT / width)));
      [from, moved] = [event.clientX, true];
      return point(event, "");
    }
    const found = bar(event);
    if (!found) return point(event, "");
    const [lane, strand, name, layer, batch, begin, length] = found;
    const where = layer === null ? "" : `\nlayer ${layer}, micro-batch ${batch}`;
    point(event, `${view.strands[strand]} ${view.names[name]} on ${view.lanes[lane]}${where}\n${time(length)} from ${time(begin, view.end)}`);
  });
  svg.addEventListener("pointerleave", (event) => point(event, ""));
  svg.addEventListener("click", (event) => {
    if (moved) return;
    const found = bar(event);
    if (found) pick(view.strands[found[1]], view.names[found[2]]);
    else pick();
  });
  svg.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    const box = svg.getBoundingClientRect(), left = box.width * LEFT / width;
    camera.zoom(event.deltaY > 0 ? 1.2 : 1 / 1.2, Math.max(0, (event.clientX - box.left - left) / (box.width - left)));
  }, { passive: false });
  svg.addEventListener("keydown", (event) => {
    const act = { ArrowLeft: () => camera.move(-0.1), ArrowRight: () => camera.move(0.1), "+": () => camera.zoom(0.7), "-": () => camera.zoom(1.4), 0: () => camera.reset() }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });
  new ResizeObserver(() => {
    if (!svg.clientWidth || Math.abs(svg.clientWidth - width) < 1) return;
    width = svg.clientWidth;
    draw();
  }).observe(svg);
  camera.draws.push(draw);
  onPick.push(draw);
  draw();
  return make("div", {}, make("h3", {}, view.title), svg);
}

function timelines(views) {
  const scales = [...new Set(views.map((view) => view.scale))].map((scale) => views.filter((view) => view.scale === scale));
  const cameras = scales.map((together) => new Camera(together));
  const every = (act) => () => cameras.forEach(act);
  const button = (text, act) => {
    const node = make("button", { type: "button" }, text);
    node.addEventListener("click", act);
    return node;
  };
  const kinds = [...new Set(views.flatMap((view) => view.strands))];
  const controls = make("div", { class: "controls" },
    button("excerpt", every((camera) => camera.reset())), button("whole", every((camera) => camera.whole())),
    button("−", every((camera) => camera.zoom(1.4))), button("+", every((camera) => camera.zoom(0.7))),
    ...kinds.map((kind) => make("span", { class: "key" }, make("i", { style: `background: var(--${kind})` }), kind)),
    make("span", { class: "hint" }, "drag to move, Ctrl and wheel to zoom, click an operator to find it in the plan"));
  const notes = views.filter((view) => view.note).map((view) => make("p", { class: "controls" }, `${view.title}: ${view.note}`));
  return section("Timeline", controls, ...scales.flatMap((together, index) => together.map((view, number) => timeline(view, number, cameras[index]))), ...notes);
}

function planTable(plans) {
  const choice = make("select", { "aria-label": "plan of which pair of graphs" }, ...plans.map((plan, index) => make("option", { value: index }, plan.title)));
  const place = make("div", { class: "scroll plan", tabindex: "0" });
  const draw = () => {
    let number = 0;
    const rows = plans[choice.value].rows.map((row) => {
      if (row.length === 1) return make("tr", {}, make("td", {}, "–"), make("td", { colspan: 3 }, row[0]));
      const [strand, lane, operator, remarks] = row;
      const node = make("tr", { "data-name": operator, "data-strand": strand }, make("td", {}, String(number++)),
        make("td", { class: strand }, strand), make("td", {}, lane), make("td", {}, operator + remarks));
      node.addEventListener("click", () => pick(strand, operator));
      return node;
    });
    const head = make("thead", {}, make("tr", {}, ...["", "strand", "lane", "operator"].map((text) => make("th", {}, text))));
    place.replaceChildren(make("table", {}, head, make("tbody", {}, ...rows)));
    mark(false);
  };
  const mark = (shown = true) => {
    for (const row of place.querySelectorAll("tr[data-name]")) {
      const is = Boolean(isPicked(row.dataset.strand, row.dataset.name));
      row.classList.toggle("picked", is);
      if (is && shown) row.scrollIntoView({ block: "nearest" });
    }
  };
  choice.addEventListener("change", draw);
  onPick.push(mark);
  draw();
  return section("Plan", choice, place);
}

function table(given) {
  const cell = (tag, text, column) => make(tag, given.numbers.includes(column) ? { class: "number" } : {}, text);
  const head = make("tr", {}, ...given.head.map((text, column) => cell("th", text, column)));
  const rows = given.rows.map((row, index) => make("tr", index === given.best ? { class: "best" } : {}, ...row.map((text, column) => cell("td", text, column))));
  return make("div", { class: "scroll" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
}

const SHADES = ["#cfd8d3", "#b6423a", "#8c5a9e", "#4f8f8b", "#d9827b", "#7a7a3a", "#5d6d8a", "#c9a24b", "#9fb4c9", "#a98467"];

/** Stacked bars on one scale, with a mark where something else ends. */
function bars(given) {
  const shade = (index) => SHADES[index % SHADES.length];
  const sums = given.rows.map((row) => row.parts.reduce((sum, part) => sum + part, 0));
  const most = Math.max(given.limit || 0, ...sums, ...given.rows.map((row) => Math.max(row.mark || 0, row.error ? row.error[1] : 0))) || 1;
  const rows = given.rows.map((row, index) => {
    let left = 0;
    const pieces = row.parts.map((part, kind) => {
      const piece = make("i", { title: `${given.parts[kind]}`, style: `left: ${100 * left / most}%; width: ${100 * part / most}%; background: ${shade(kind)}` });
      left += part;
      return piece;
    });
    for (const mark of [row.mark, given.limit]) if (mark) pieces.push(make("b", { style: `left: calc(${100 * mark / most}% - 1px)` }));
    if (row.error) {
      const [low, high] = row.error;
      pieces.push(make("s", { title: `${time(low)} to ${time(high)}`, style: `left: ${100 * low / most}%; width: ${100 * (high - low) / most}%` }));
    }
    return make("tr", index === given.best ? { class: "best" } : {}, make("td", {}, row.name), make("td", {}, make("div", { class: "track" }, ...pieces)), make("td", { class: "number" }, row.text));
  });
  const keys = given.parts.map((part, kind) => make("span", { class: "key" }, make("i", { style: `background: ${shade(kind)}` }), part));
  if (given.marked) keys.push(make("span", { class: "key" }, make("i", { style: "background: var(--ink); width: 2px" }), given.marked));
  return make("div", {}, make("h3", {}, given.title), make("div", { class: "controls" }, ...keys), make("div", { class: "scroll" }, make("table", { class: "bars" }, make("tbody", {}, ...rows))));
}

/** From red for nothing over sand to green for all. */
function heat(share) {
  const [low, high, at] = share < 0.5 ? [[182, 66, 58], [243, 230, 200], share * 2] : [[243, 230, 200], [47, 125, 98], share * 2 - 1];
  return low.map((from, index) => Math.round(from + (high[index] - from) * at));
}

function overlap(given) {
  const head = make("tr", {}, make("td"), ...given.columns.map((name) => make("th", { scope: "col" }, name)));
  const rows = given.rows.map((name, row) => make("tr", {}, make("th", { scope: "row" }, name), ...given.shares[row].map((share) => {
    if (share === null) return make("td", { title: "not measured together" }, "");
    const ink = share < 0.2 || share > 0.8 ? "#fff" : "var(--ink)";
    return make("td", { style: `background: rgb(${heat(share)}); color: ${ink}` }, `${Math.round(share * 100)}%`);
  })));
  const said = make("p", { class: "controls" }, "Share of each communication, or of the shorter of the two, that hides beside another operator.");
  return section("Overlap", said, make("div", { class: "scroll" }, make("table", { class: "heat" }, make("thead", {}, head), make("tbody", {}, ...rows))));
}

function wide(node) {
  node.classList.add("wide");
  return node;
}

function page() {
  const facts = data.facts.map(([name, value]) => make("span", {}, `${name} `, make("b", {}, value)));
  const parts = [make("h1", {}, data.title), make("div", { class: "facts" }, ...facts), list(data.conclusions)];
  const beside = [data.timelines.length ? timelines(data.timelines) : null, data.plans.length ? planTable(data.plans) : null];
  parts.push(make("div", { class: beside.includes(null) ? "" : "beside" }, ...beside));
  const halves = [];
  for (const group of data.groups) {
    const shown = [...group.tables.map(table), ...group.bars.map(bars)];
    const node = section(group.title, ...shown);
    halves.push(group.wide ? wide(node) : node);
  }
  if (data.changes.length) halves.push(section("What to change", list(data.changes)));
  if (data.overlap) halves.push(wide(overlap(data.overlap)));
  parts.push(make("div", { class: "halves" }, ...halves));
  document.body.append(make("main", {}, ...parts), tip);
}
page();
