// Sections of a comparison: losses, throughput, load over time, routers, who takes what, capacity, configuration.
const NAMES = {dense: "dense", moe: "MoE"};
const ofModel = (model) => data.curves.filter((point) => point.model === model);
const layerLines = () => data.telemetry.filter((entry) => entry.kind === "layer");
const layersOf = (lines) => [...new Set(lines.map((entry) => entry.layer))];

function summarySection() {
  const {dense, moe} = data.results;
  const seconds = data.results.equal_time_seconds;
  const rows = [
    ["parameters", "parameters", format.count], ["active parameters", "active_parameters", format.count],
    ["training tokens", "tokens", format.count], ["training seconds", "training_seconds", format.fixed(1)],
    ["training tokens a second", "tokens_per_second", format.count],
    ["bits a byte at equal tokens and FLOPs", "bits_per_byte_at_equal_tokens", format.fixed(4)],
    [`bits a byte at equal time (${seconds.toFixed(0)} s)`, "bits_per_byte_at_equal_time", format.fixed(4)],
    ["expert load, largest over mean", "expert_load_max_over_mean", format.fixed(2)],
  ].map(([title, key, show]) => [title, dense[key] == null ? "–" : show(dense[key]), moe[key] == null ? "–" : show(moe[key])]);
  rows.splice(2, 0, ["FLOPs a token, forward", format.count(dense.flops_per_token.total), format.count(moe.flops_per_token.total)]);
  rows.push(["choices dropped", "–", format.percent(moe.dropped / moe.choices)]);
  rows.push(["telemetry, of the time", ...[dense, moe].map((model) => (100 * model.telemetry_share).toFixed(2) + " %")]);
  const gain = dense.bits_per_byte_at_equal_tokens - moe.bits_per_byte_at_equal_tokens;
  section("summary", "Summary",
    el("p", {}, `After the same ${format.count(moe.tokens)} tokens the MoE model needs ${Math.abs(gain).toFixed(4)} bits a byte ` +
       `${gain >= 0 ? "less" : "more"} than the dense model of equal FLOPs on text that neither was trained on.`),
    table("Both models", [["", null, "text"], ["dense"], ["MoE"]], rows),
    note("Equal time is each model's own seconds in training steps. The schedule of the learning rate is set by tokens, so the " +
         "slower model is read before its schedule has ended, which counts against it."));
}

function lossSection() {
  const flops = (model, tokens) => 3 * data.results[model].flops_per_token.total * tokens;
  const axes = {
    tokens: ["training tokens", (model, point) => point.tokens],
    flops: ["training FLOPs", (model, point) => flops(model, point.tokens)],
    seconds: ["seconds in training steps", (model, point) => point.seconds],
  };
  let chosen = "tokens";
  const numbers = table("Held-out bits a byte", [["model", null, "text"], ["step", format.count], ["tokens", format.count],
    ["FLOPs", (n) => n.toExponential(2)], ["seconds", format.fixed(1)], ["bits a byte", format.fixed(4)]],
    data.curves.map((p) => [NAMES[p.model], p.step, p.tokens, flops(p.model, p.tokens), p.seconds, p.bits_per_byte]));
  const {figure, element} = chart({
    title: "Loss on held-out text",
    words: "Lower is better. Each mark is an evaluation on files that training never sees.",
    traces: (c) => ["dense", "moe"].map((model, i) => {
      const points = ofModel(model);
      return line({...c, series: [c.dense, c.moe]}, i, NAMES[model], points.map((p) => axes[chosen][1](model, p)),
                  points.map((p) => p.bits_per_byte));
    }),
    layout: (c) => layoutOf(c, axis(c, axes[chosen][0], {rangemode: "tozero"}), axis(c, "bits a byte")),
    tools: radios("against", "loss-axis", [["tokens", "tokens"], ["flops", "FLOPs"], ["seconds", "seconds"]],
                  (value) => { chosen = value; draw(figure); }),
    numbers,
  });
  figure.node.id = "loss-chart";
  const save = el("button", {type: "button", class: "save", onclick: () => Plotly.downloadImage(figure.node,
    {format: "png", width: 1200, height: 675, scale: 1, filename: "turnout-compare"})}, "Save as PNG");
  element.append(save);
  section("loss", "Loss", element);
}

function throughputSection() {
  const intervals = (model) => data.telemetry.filter((entry) => entry.kind === "interval" && entry.model === model);
  const named = ["dense", "moe"];
  const {element} = chart({
    title: "Training throughput",
    words: "Tokens a second in training steps, over the run. Other work on the machine shows as dips.",
    traces: (c) => named.map((model, i) => line({...c, series: [c.dense, c.moe]}, i, NAMES[model],
      intervals(model).map((e) => e.tokens), intervals(model).map((e) => e.tokens_per_second))),
    layout: (c) => layoutOf(c, axis(c, "training tokens"), axis(c, "tokens a second", {rangemode: "tozero"})),
    numbers: table("Means over the run", [["model", null, "text"], ["tokens a second", format.count]],
                   named.map((model) => [NAMES[model], data.results[model].tokens_per_second])),
  });
  section("throughput", "Throughput", element);
}

// Rows of each expert over the mean of the experts.
function ratios(entry) {
  const rows = entry.load.reduce((a, b) => a + b, 0);
  return entry.load.map((mine) => rows > 0 ? mine * entry.load.length / rows : 0);
}

// Where the colours end: 98 % of all cells lie below it. The peaks of the first steps would leave the rest in one shade.
function endOfColours(lines) {
  const all = lines.flatMap(ratios).sort((a, b) => a - b);
  const end = Math.max(2, Math.ceil(2 * all[Math.floor(0.98 * (all.length - 1))]) / 2);
  return {end, beyond: all[all.length - 1] > end};
}

function heatmap(lines, layer, {end, beyond}) {
  const mine = lines.filter((entry) => entry.layer === layer);
  const experts = mine[0].load.length;
  const every = [...Array(experts).keys()];
  const last = mine[mine.length - 1];
  const columns = mine.map(ratios);
  const z = every.map((e) => columns.map((column) => column[e]));
  const steps = [...Array(Math.floor(end) + 1).keys()].concat(end % 1 ? [end] : []);
  const marks = steps.map((n) => n === end && beyond ? `≥ ${n}` : String(n));
  return chart({
    title: `Layer ${layer}`,
    words: `At the end the fullest of ${experts} experts has ${last.max_over_mean.toFixed(2)} times the mean.`,
    traces: (c) => [{type: "heatmap", x: mine.map((e) => e.step), y: every, z,
      colorscale: c.scale, zauto: false, zmin: 0, zmax: end, colorbar: {title: {text: "× mean", side: "right"}, thickness: 10, outlinewidth: 0,
        tickvals: steps, ticktext: marks},
      hovertemplate: "step %{x}<br>expert %{y}<br>%{z:.2f} × the mean<extra></extra>"}],
    layout: (c) => layoutOf(c, axis(c, "step"), axis(c, "expert", {dtick: Math.max(1, Math.ceil(experts / 8))}),
                            {margin: {l: 48, r: 8, t: 8, b: 40}}),
    numbers: table(`Rows of each expert of layer ${layer} in the last interval`, [["expert"], ["rows", format.count]],
                   every.map((e) => [e, last.load[e]])),
  }).element;
}

function loadSection() {
  const lines = layerLines();
  if (lines.length === 0) return;
  const colours = endOfColours(lines);
  section("load", "Load of the experts over time",
    note("A column is an interval of training, a row an expert; 1 is the mean load, 0 an expert without a token." +
         (colours.beyond ? ` The colours end at ${colours.end} times the mean: above it lie less than 2 % of the cells, ` +
                           "which pointing at them tells." : "")),
    el("div", {class: "grid"}, layersOf(lines).map((layer) => heatmap(lines, layer, colours))));
}

function routersSection() {
  const lines = layerLines();
  if (lines.length === 0) return;
  const experts = lines[0].load.length;
  const measures = [
    ["entropy", "Entropy of the router", `In nats: 0 is certain, ${Math.log(experts).toFixed(2)} undecided.`, (e) => e.entropy],
    ["max", "Largest load over the mean", "1 is balanced.", (e) => e.max_over_mean],
    ["logits", "Size of the router's logits", "Root of the mean square.", (e) => e.logit_rms],
    ["balance", "Balance loss", "Before its coefficient.", (e) => e.balance_loss],
    ["dead", "Experts without a token", "In a whole interval.", (e) => e.dead_experts],
    ["dropped", "Choices dropped", "For lack of a place.", (e) => e.dropped / e.choices],
  ].filter(([, , , value]) => lines.some((entry) => value(entry)));  // what is 0 or absent all along is said below
  const never = [["dead", "no expert went without a token in any interval"], ["dropped", "no choice was dropped"]]
    .filter(([key]) => !measures.some(([name]) => name === key)).map(([, words]) => words);
  const charts = measures.map(([, title, words, value]) => chart({
    title, words,
    traces: (c) => layersOf(lines).map((layer, i) => {
      const mine = lines.filter((entry) => entry.layer === layer);
      return line(c, i, `layer ${layer}`, mine.map((e) => e.step), mine.map(value));
    }),
    layout: (c) => layoutOf(c, axis(c, "step"), axis(c, "", {rangemode: "tozero"}), {margin: {l: 48, r: 8, t: 8, b: 40}}),
    numbers: table(`${title}, first and last interval`, [["layer"], ["first", format.fixed(3)], ["last", format.fixed(3)]],
      layersOf(lines).map((layer) => {
        const mine = lines.filter((entry) => entry.layer === layer);
        return [layer, value(mine[0]), value(mine[mine.length - 1])];
      })),
  }).element);
  section("routers", "The routers", el("div", {class: "grid"}, charts),
          never.length ? note(`In this run ${never.join(", and ")}.`) : null);
}

// What the experts of one layer take: shared by comparisons and by an inspected layer.
function takersTable(layer, takers) {
  const names = (list) => list.map((entry) => el("span", {class: "name"}, entry.name, el("small", {},
    ` ${(100 * entry.share).toFixed(0)} %, ×${entry.lift.toFixed(1)}`)));
  const samples = (list) => list.map((s) => el("span", {class: "sample"}, s.before, el("mark", {}, s.at), s.after));
  return table(`Layer ${layer}: share of the expert's rows that a byte or word fills, and how many times its share of all rows that is`,
    [["expert"], ["of all rows", format.percent], ["bytes", null, "text"], ["words", null, "text"], ["examples", null, "text"]],
    takers.map((t) => [t.expert, t.share, names(t.bytes), names(t.words), samples(t.examples)]));
}

function takersSection() {
  section("takers", "What each expert takes",
    note("From the trained MoE on held-out text. The marked byte of an example is the one that was sent to the expert, where its " +
         "weight is largest. A word is counted for each of its bytes."),
    data.layers.map((entry, i) => el("details", {class: "always", open: i === 0 ? "open" : null},
      el("summary", {}, `Layer ${entry.trace.layer}`), takersTable(entry.trace.layer, entry.takers))));
}

// Dropped choices and idle places of one or more sweeps.
function sweepCharts(sweeps) {
  return [["dropped_share", "Choices dropped"], ["idle_share", "Places without a row"]].map(([key, title]) => chart({
    title, words: "Share, against the capacity factor.",
    traces: (c) => sweeps.map(([name, sweep], i) => line(c, i, name, sweep.map((e) => e.factor), sweep.map((e) => e[key]))),
    layout: (c) => layoutOf(c, axis(c, "capacity factor"), axis(c, "", {tickformat: ".0%", rangemode: "tozero"}),
                            {showlegend: sweeps.length > 1}),
    numbers: el("div", {}, sweeps.map(([name, sweep]) => table(name, [["factor"], ["places", format.count],
      ["dropped", format.count], ["share", format.percent], ["idle", format.count], ["share", format.percent]],
      sweep.map((e) => [e.factor, e.places, e.dropped, e.dropped_share, e.idle, e.idle_share])))),
  }).element);
}

function capacitySection() {
  section("capacity", "If experts had only so many places",
    note("The choices of the trained routers on held-out text, with places counted over the tokens of one call: what a fixed " +
         "capacity would drop, and what it would leave idle."),
    el("div", {class: "grid"}, sweepCharts(data.layers.map((entry) => [`layer ${entry.trace.layer}`, entry.trace.capacity]))));
}

function configurationSection() {
  section("configuration", "Configuration and hardware",
    optionTable("Machine", data.machine), optionTable("Training", data.training), optionTable("Text", data.text),
    optionTable("MoE model", data.models.moe), optionTable("Dense model", data.models.dense));
}

function compareSections() {
  summarySection();
  lossSection();
  throughputSection();
  loadSection();
  routersSection();
  takersSection();
  capacitySection();
  configurationSection();
}
