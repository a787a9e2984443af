"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();

// The plotting library is packed inside the page; the browser's own decompression unpacks it.
async function loadPlotly() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

function layout(changes) {
  const axis = {
    gridcolor: colour("rule"), zerolinecolor: colour("rule"), linecolor: colour("rule"), automargin: true,
    title: { font: { size: 13 }, standoff: 8 }, tickfont: { size: 12 },
  };
  const { xaxis, yaxis, xaxis2, yaxis2, ...rest } = changes;
  const axes = Object.fromEntries(
    Object.entries({ xaxis: xaxis ?? {}, yaxis: yaxis ?? {}, xaxis2, yaxis2 })
      .filter(([, value]) => value)
      .map(([name, value]) => [name, { ...axis, ...value, title: { ...axis.title, text: value.title } }]),
  );
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 12, r: 12, t: 12, b: 12 },
    font: { family: getComputedStyle(document.body).fontFamily, color: colour("ink"), size: 13 },
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("rule"), font: { color: colour("ink") } },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, ...rest, ...axes,
  };
}

function draw(element, traces, changes) {
  Plotly.react(element, traces, layout(changes), { displayModeBar: false, responsive: true });
}

const thousands = (value) => value.toLocaleString("en-US", { maximumFractionDigits: 0 });

function drawAccuracy() {
  const element = document.getElementById("accuracy-chart");
  const roles = data.order.filter((role) => role in data.models);
  if (!element) return;
  const trace = (split, mode, place) => {
    const known = roles.filter((role) => data.models[role].accuracy[split][mode] !== null);
    const values = known.map((role) => 100 * data.models[role].accuracy[split][mode]);
    const bounds = known.map((role, i) => data.models[role].interval[split][mode]?.map((b) => 100 * b) ?? [values[i], values[i]]);
    return {
      type: "scatter", mode: "markers", name: `thinking ${mode}`, legendgroup: mode, showlegend: place === 1,
      x: known.map((role) => roles.indexOf(role) + (mode === "on" ? -0.11 : 0.11)), y: values,
      xaxis: `x${place}`, yaxis: `y${place}`, text: known,
      marker: { size: 10, color: colour(mode === "on" ? "model" : "data"), symbol: mode === "on" ? "circle" : "diamond" },
      error_y: {
        type: "data", symmetric: false, thickness: 1.6, width: 5,
        array: bounds.map(([, high], i) => high - values[i]), arrayminus: bounds.map(([low], i) => values[i] - low),
      },
      hovertemplate: `%{text}, ${split}, thinking ${mode}: %{y:.1f} %<extra></extra>`,
    };
  };
  const traces = ["standard", "hard"].flatMap((split, i) => ["on", "off"].map((mode) => trace(split, mode, i + 1)));
  const measured = traces.filter((one) => one.x.length > 0);
  element.hidden = measured.length === 0;
  if (element.hidden) return;
  const x = { tickvals: roles.map((_, i) => i), ticktext: roles, range: [-0.5, roles.length - 0.5], showgrid: false, zeroline: false };
  const y = { range: [0, 104], ticksuffix: " %" };
  draw(element, measured, {
    xaxis: { ...x, domain: [0, 0.48], title: "standard problems" },
    yaxis: y,
    xaxis2: { ...x, domain: [0.52, 1], title: "hard problems" },
    yaxis2: { ...y, anchor: "x2", showticklabels: false },
  });
}

// What a point of the Pareto plot is placed by: a title, the front that was solved for it, and where a point lies.
function paretoAxes({ fronts, pareto, parent, batch_tokens: tokens }) {
  const perSecond = (ms) => (ms > 0 ? 1000 * (tokens && parent.request_ms ? tokens : 1) / ms : null);
  const time = tokens && parent.request_ms ? "request_ms" : "latency_ms";
  const memory = parent.memory_bytes ? "memory_bytes" : "parameters";
  const scale = memory === "memory_bytes" ? 2 ** 20 : 1;
  return {
    latency: { title: "predicted time of a decode step, ms", front: pareto, limit: "latency_ms", at: (costs) => costs.latency_ms },
    throughput: {
      title: time === "request_ms" ? "predicted tokens a second of the batch" : "predicted decode steps a second",
      front: fronts?.request_ms ?? pareto, limit: time, at: (costs) => perSecond(costs[time]),
    },
    memory: {
      title: memory === "parameters" ? "parameters" : "predicted memory, MiB",
      front: fronts?.[memory] ?? pareto, limit: memory, at: (costs) => costs[memory] / scale,
    },
  };
}

let paretoAxis = "latency";

function buildPareto() {
  const choices = document.getElementById("pareto-axes");
  if (!data.search || !choices) return;
  for (const name of Object.keys(paretoAxes(data.search))) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    button.ariaPressed = name === paretoAxis;
    button.addEventListener("click", () => {
      paretoAxis = name;
      for (const other of choices.children) other.ariaPressed = other === button;
      drawPareto(data.search);
    });
    choices.append(button);
  }
}

function drawSearch() {
  const search = data.search;
  if (!search) return;
  const { proof, machine } = search;
  document.getElementById("search-note").textContent =
    `${search.slots.length} subblocks, ${search.slots.reduce((sum, slot) => sum + slot.options.length, 0)} options. ` +
    `The solver's answer is ${proof.status.toLowerCase()}: score ${proof.objective.toPrecision(4)}, bound ` +
    `${proof.bound.toPrecision(4)}, gap ${(100 * proof.gap).toPrecision(2)} %. Latency of ${machine.device}.`;
  drawPareto(search);
  drawScores(search);
  drawCosts();
  drawFusion(search.fusion);
}

function drawPareto(search) {
  const axis = paretoAxes(search)[paretoAxis];
  const left = (choice, part) => search.slots.filter((slot, i) => slot.part === part && slot.options[choice[i]].size !== 0).length;
  const perSecond = (costs) => (costs.request_ms && search.batch_tokens ? `, ${thousands((1000 * search.batch_tokens) / costs.request_ms)} tokens a second` : "");
  const times = (costs) =>
    `${costs.latency_ms.toFixed(2)} ms a decode step` +
    (costs.time_to_first_token_ms ? `, ${costs.time_to_first_token_ms.toFixed(1)} ms to the first token` : "") + perSecond(costs);
  const about = (point) =>
    (point.limit ? `within ${point.limit}<br>` : "") + `score ${point.score.toFixed(4)}<br>${times(point.costs)}<br>` +
    `${thousands(point.costs.parameters)} parameters, ${thousands(point.costs.kv_bytes_per_token)} KV bytes a token` +
    (point.costs.memory_bytes ? `, ${(point.costs.memory_bytes / 2 ** 20).toFixed(1)} MiB` : "") +
    (point.choice ? `<br>attention in ${left(point.choice, "attention")}, FFN in ${left(point.choice, "ffn")} of ${search.slots.length / 2} layers` : "");
  const marker = (name, point, tint, symbol, size) => ({
    type: "scatter", mode: "markers", name, x: [axis.at(point.costs)], y: [point.score], text: [about(point)],
    marker: { color: tint, symbol, size, line: { color: colour("card"), width: 1.5 } }, cliponaxis: false, hovertemplate: `<b>${name}</b><br>%{text}<extra></extra>`,
  });
  const traces = [
    {
      type: "scatter", mode: "lines+markers", name: "Pareto front", x: axis.front.map((p) => axis.at(p.costs)),
      y: axis.front.map((p) => p.score), text: axis.front.map((p) => about({ ...p, limit: `${axis.limit} ${(p.limit_ms ?? p.limit).toPrecision(6)}` })), line: { color: colour("model"), width: 2 },
      marker: { size: 6 }, hovertemplate: "%{text}<extra></extra>",
    },
    marker("parent", { costs: search.parent, score: 0 }, colour("ink"), "square", 11),
    marker("random choice", search.random_child, colour("bad"), "x", 12),
    marker("greedy choice", search.greedy_child, colour("data"), "diamond", 13),
    ...Object.entries(search.baselines ?? {}).map(([name, point]) => marker(name, point, colour("other"), name === "uniform" ? "hexagon" : "triangle-up", 12)),
    marker("chosen child", search.child, colour("good"), "star", 18),
  ];
  const limit = search.limits[axis.limit];
  const place = limit ? axis.at({ [axis.limit]: limit }) : null;
  const line = { type: "line", xref: "x", yref: "paper", y0: 0, y1: 1, line: { color: colour("muted"), dash: "dot", width: 1.5 } };
  const word = { x: place, y: 1, yref: "paper", yanchor: "top", xanchor: paretoAxis === "throughput" ? "left" : "right", text: "limit", showarrow: false, font: { color: colour("muted") } };
  draw(document.getElementById("pareto-chart"), traces, {
    xaxis: { title: axis.title },
    yaxis: { title: "sum of replace-one-block KL, nats a token", rangemode: "tozero" },
    shapes: place ? [{ ...line, x0: place, x1: place }] : [], annotations: place ? [word] : [],
  });
}

// Models that were timed to explain what each subblock costs.
function drawCosts() {
  const models = data.costs?.models ?? [];
  document.getElementById("costs").hidden = models.length === 0;
  if (models.length === 0) return;
  const runs = (sizes) => sizes.reduce((found, size) => (found.at(-1)?.size === size ? (found.at(-1).count += 1, found) : [...found, { size, count: 1 }]), []);
  const told = (sizes) => runs(sizes).map(({ size, count }) => `${size} × ${count}`).join(", ");
  const about = (m) => `KV heads ${told(m.num_key_value_heads)}<br>FFN channels ${told(m.intermediate_size)}`;
  const measured = models.map((m) => m.median_ms);
  const ends = [Math.min(...measured) * 0.92, Math.max(...measured) * 1.06];
  const line = { type: "scatter", mode: "lines", x: ends, y: ends, line: { color: colour("muted"), dash: "dot", width: 1.5 }, hoverinfo: "skip", showlegend: false };
  const points = {
    type: "scatter", mode: "markers", showlegend: false, x: models.map((m) => m.explained_ms), y: measured, text: models.map(about),
    customdata: models.map((m) => 100 * (m.explained_ms / m.median_ms - 1)), marker: { size: 9, color: colour("model") },
    error_y: {
      type: "data", symmetric: false, thickness: 1.4, width: 4,
      array: models.map((m) => Math.max(...m.step_ms) - m.median_ms), arrayminus: models.map((m) => m.median_ms - Math.min(...m.step_ms)),
    },
    hovertemplate: "%{text}<br>predicted %{x:.3f} ms, measured %{y:.3f} ms (%{customdata:+.1f} %)<extra></extra>",
  };
  draw(document.getElementById("costs-chart"), [line, points], { xaxis: { title: "predicted time of a decode step, ms" }, yaxis: { title: "measured, ms" } });
}

function drawFusion(fusion) {
  const box = document.getElementById("fusion");
  if (!box) return;
  const runs = fusion.runs.filter((run) => run.dependency.length > 1);
  box.hidden = runs.length === 0;
  const charts = document.getElementById("fusion-charts");
  while (charts.children.length < runs.length) charts.append(Object.assign(document.createElement("div"), { className: "chart" }));
  runs.forEach((run, i) => {
    const names = run.layers.map(String);
    const z = run.dependency.map((row, from) => row.map((value, to) => (to > from ? value : null)));
    const heat = {
      type: "heatmap", x: names, y: names, z, zmin: 0, zmax: Math.max(...z.flat()) || 1, xgap: 1, ygap: 1, hoverongaps: false, colorbar: { thickness: 10, outlinewidth: 0 },
      colorscale: [[0, colour("soft")], [0.5, colour("data")], [1, colour("bad")]], hovertemplate: "FFN %{x} without FFN %{y}: %{z:.4f}<extra></extra>",
    };
    const place = (layer) => names.indexOf(String(layer));
    const shapes = run.groups.map((group) => {
      const [low, high] = [place(group[0]) - 0.5, place(group.at(-1)) + 0.5];
      return { type: "rect", x0: low, x1: high, y0: low, y1: high, line: { color: colour("ink"), width: 2 } };
    });
    charts.children[i].style.height = "300px";
    draw(charts.children[i], [heat], {
      xaxis: { title: "layer of the FFN", type: "category", showgrid: false }, yaxis: { title: "removed before it", type: "category", autorange: "reversed", showgrid: false }, shapes,
    });
  });
}

function drawScores(search) {
  const slots = search.slots.map((slot, i) => ({ ...slot, picked: search.child.choice[i] }));
  const sizes = (part) => [...new Set(slots.filter((s) => s.part === part).flatMap((s) => s.options.slice(1).map((o) => o.size)))];
  const word = (part, size) => {
    const what = part === "ffn" ? "FFN" : part;
    if (size === "linear") return `linear ${what}`;
    return size ? `${size} ${part === "ffn" ? "channels" : size === 1 ? "KV head" : "KV heads"}` : `no ${what}`;
  };
  const width = (size) => (size === "linear" ? 0.5 : size);
  const options = ["attention", "ffn"].flatMap((part) => sizes(part).sort((a, b) => width(b) - width(a)).map((size) => ({ part, size })));
  const layers = [...new Set(slots.map((slot) => slot.layer))];
  const score = ({ part, size }, layer) =>
    slots.find((s) => s.part === part && s.layer === layer)?.options.slice(1).find((o) => o.size === size)?.score ?? null;
  const chosen = slots.filter((slot) => slot.picked > 0);
  const noisy = (slot) => data.margins[`${slot.layer}/${slot.part}`]?.within_noise;
  const about = ({ part, size }, layer) => {
    const block = search.blocks.find((b) => b.layer === layer && b.part === part && b.size === size);
    const error = block && block.kl === score({ part, size }, layer) ? block.errors?.kl : null;
    const note = data.margins[`${layer}/${part}`];
    return (error ? ` ± ${error.toPrecision(2)}` : "") + (note ? `<br>${note.told}` : "");
  };
  const heat = {
    type: "heatmap", x: layers, y: options.map((o) => word(o.part, o.size)), z: options.map((o) => layers.map((layer) => score(o, layer))),
    colorscale: [[0, colour("soft")], [0.5, colour("data")], [1, colour("bad")]], xgap: 2, ygap: 2, hoverongaps: false,
    colorbar: { thickness: 10, outlinewidth: 0 }, text: options.map((o) => layers.map((layer) => about(o, layer))), hovertemplate: "layer %{x}, %{y}: %{z:.4f}%{text}<extra></extra>",
  };
  const dots = {
    type: "scatter", mode: "markers", x: chosen.map((s) => s.layer), y: chosen.map((s) => word(s.part, s.options[s.picked].size)),
    marker: { color: colour("ink"), size: 7, symbol: chosen.map((s) => (noisy(s) ? "circle-open" : "circle")) }, hoverinfo: "skip", showlegend: false,
  };
  draw(document.getElementById("scores-chart"), [heat, dots], {
    xaxis: { title: "layer of the parent", showgrid: false, zeroline: false, dtick: layers.length > 24 ? 4 : 1 },
    yaxis: { autorange: "reversed", type: "category", showgrid: false },
  });
}

// The mean around each point beside the raw curve: where a noisy curve goes.
function smoothed(values) {
  const half = Math.ceil(values.length / 40);
  return values.map((_, i) => {
    const reach = Math.min(half, i, values.length - 1 - i);
    const near = values.slice(i - reach, i + reach + 1);
    return near.reduce((sum, value) => sum + value, 0) / near.length;
  });
}

const FIRST = ["reward", "accuracy", "format", "loss", "error"];
const rank = (metric) => (FIRST.indexOf(metric.split("/").pop()) + FIRST.length + 1) % (FIRST.length + 1);
const chosenMetric = {};

function drawCurve(label, curves, element) {
  const metric = chosenMetric[label];
  const { step, value } = curves[metric];
  const long = value.length > 30;
  const raw = { type: "scatter", mode: "lines", x: step, y: value, showlegend: false, line: { color: colour("model"), width: long ? 1 : 2 }, opacity: long ? 0.35 : 1, hovertemplate: "step %{x}: %{y:.4g}<extra></extra>" };
  const mean = { ...raw, y: smoothed(value), line: { color: colour("model"), width: 2.2 }, opacity: 1, hoverinfo: "skip", hovertemplate: null };
  draw(element, long ? [raw, mean] : [raw], { xaxis: { title: "step" }, yaxis: {} });
}

const curveCharts = [];

function buildCurves() {
  const labels = Object.keys(data.curves);
  document.getElementById("curves").hidden = labels.length === 0;
  for (const label of labels) {
    const curves = data.curves[label];
    const metrics = Object.keys(curves).sort((a, b) => rank(a) - rank(b));
    chosenMetric[label] = metrics[0];
    const box = document.createElement("div");
    const title = document.createElement("h3");
    const choices = document.createElement("div");
    const chart = document.createElement("div");
    box.className = "curve";
    title.textContent = label;
    choices.className = "choices";
    chart.className = "chart";
    for (const metric of metrics) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = metric.replaceAll("_", " ");
      button.ariaPressed = metric === chosenMetric[label];
      button.addEventListener("click", () => {
        chosenMetric[label] = metric;
        for (const other of choices.children) other.ariaPressed = other === button;
        drawCurve(label, curves, chart);
      });
      choices.append(button);
    }
    box.append(title, choices, chart);
    document.getElementById("curve-charts").append(box);
    curveCharts.push(() => drawCurve(label, curves, chart));
  }
}

function drawAll() {
  drawAccuracy();
  drawSearch();
  curveCharts.forEach((drawOne) => drawOne());
}

function followTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  root.classList.toggle("dark", system.matches);
  document.getElementById("theme").addEventListener("click", () => {
    root.classList.toggle("dark");
    drawAll();
  });
  system.addEventListener("change", () => {
    root.classList.toggle("dark", system.matches);
    drawAll();
  });
}

function followLineage() {
  const box = document.getElementById("lineage");
  if (!box) return;
  const rows = [...box.querySelectorAll("li")];
  const above = Object.fromEntries(rows.map((row) => [row.dataset.label, row.dataset.above.split(" ").filter(Boolean)]));
  for (const row of rows) {
    row.addEventListener("mouseenter", () => {
      const lit = new Set([row.dataset.label, ...above[row.dataset.label]]);
      box.classList.add("pointing");
      for (const part of box.querySelectorAll("[data-label]")) part.classList.toggle("lit", lit.has(part.dataset.label));
      for (const arc of box.querySelectorAll(".arc")) {
        arc.classList.toggle("lit", lit.has(arc.dataset.source) && lit.has(arc.dataset.target));
      }
    });
    row.addEventListener("mouseleave", () => {
      box.classList.remove("pointing");
      for (const part of box.querySelectorAll(".lit")) part.classList.remove("lit");
    });
  }
}

function followFilter() {
  const filter = document.getElementById("filter");
  filter.addEventListener("input", () => {
    const wanted = filter.value.toLowerCase();
    for (const section of document.getElementById("settings").children) {
      const name = section.querySelector("h3").textContent;
      const lines = [...section.querySelectorAll("dl > div")];
      for (const line of lines) line.hidden = !`${name}.${line.textContent}`.toLowerCase().includes(wanted);
      section.hidden = lines.every((line) => line.hidden);
    }
  });
}

followTheme();
followLineage();
followFilter();
buildPareto();
buildCurves();
loadPlotly().then(drawAll).then(() => root.classList.add("drawn"));
