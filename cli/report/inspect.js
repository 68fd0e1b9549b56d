// Sections of an inspected example or layer: stages, tokens, policies, capacity, collapse, hierarchy.
const shapeText = (shape) => shape == null ? "" : !Array.isArray(shape) ? String(shape) : shape.length ? `[${shape.join(", ")}]` : "scalar";
const range = (n) => [...Array(n).keys()];

function stagesSection() {
  const s = data.stages;
  section("stages", "Stages",
    table("Shapes by the names of the description, and here", [["described as", null, "text"], ["shape", shapeText, "text"],
      ["here", null, "text"], ["shape", shapeText, "text"]],
      s.stages.map((row) => [row.described, shapeText(row.described_shape), row.here, shapeText(row.shape)])),
    el("p", {}, `The dispatch tensor holds ${format.count(s.dispatch_tensor_numbers)} numbers, ${format.count(s.dispatch_tensor_ones)} ` +
       `of them not 0; the plan says the same in ${format.count(s.plan_numbers)}. Balance loss ${s.loss.toFixed(4)}.`));
}

function tokensSection() {
  const tokens = data.tokens, experts = tokens[0].scores.length;
  const label = (t) => `${t.sequence}:${t.position}`;
  const fate = (choice) => choice.fate === "kept" ? `place ${choice.place}`
    : el("span", {class: choice.fate === "dropped" ? "dropped" : "quiet"}, choice.fate);
  const cell = (choice) => choice.fate === "none" ? "–"
    : el("span", {}, `e${choice.expert} ${choice.weight.toFixed(3)} `, fate(choice));
  const shown = tokens.slice(0, 64);
  const {element} = chart({
    title: "Probabilities of the gate", words: "Each column is a token, as sequence:position, each row an expert.",
    traces: (c) => [{type: "heatmap", x: shown.map(label), y: range(experts), z: range(experts).map((e) => shown.map((t) => t.scores[e])),
      colorscale: c.scale, zauto: false, zmin: 0, zmax: 1, colorbar: {thickness: 10, outlinewidth: 0},
      hovertemplate: "token %{x}<br>expert %{y}<br>%{z:.3f}<extra></extra>"}],
    layout: (c) => layoutOf(c, axis(c, "token", {type: "category"}), axis(c, "expert", {dtick: Math.max(1, Math.ceil(experts / 16))})),
    numbers: table("Choices: expert, weight, and what became of it", [["token", null, "text"], ["choices in order", null, "text"]],
      shown.map((t) => [label(t), el("span", {}, t.choices.flatMap((choice, i) => [i ? "; " : "", cell(choice)]))])),
  });
  section("tokens", "Tokens", element, tokens.length > shown.length ? note(`The first ${shown.length} of ${tokens.length}.`) : null);
}

function policiesSection() {
  const experts = data.policies[0].rows.length;
  const {element} = chart({
    title: "Rows of each expert", words: "After capacity, under each policy for the second expert.",
    traces: (c) => data.policies.map((p, i) => ({type: "bar", name: p.policy, x: range(experts).map((e) => `e${e}`), y: p.rows,
      marker: {color: c.series[i % c.series.length], pattern: {shape: ["", "/", "x", "."][i % 4]}}})),
    layout: (c) => layoutOf(c, axis(c, "expert", {type: "category"}), axis(c, "rows"), {barmode: "group"}),
    numbers: table("Policies", [["policy", null, "text"], ["second experts", format.count], ["dropped", format.count],
      ["loss", format.fixed(4)], ["rows of each expert", null, "text"]],
      data.policies.map((p) => [p.policy, p.second_experts, p.dropped, p.loss, p.rows.join(" ")])),
  });
  section("policies", "Second-expert policies", element);
}

function collapseSection() {
  const steps = data.collapse;
  const {element} = chart({
    title: "From balanced to collapsed", words: "The balance loss as tokens that took the experts in turn are all sent to expert 0.",
    traces: (c) => [line(c, 0, "balance loss", steps.map((s) => s.share), steps.map((s) => s.loss)),
                    line(c, 1, "largest load over mean", steps.map((s) => s.share), steps.map((s) => s.max_over_mean))],
    layout: (c) => layoutOf(c, axis(c, "share of the tokens moved", {tickformat: ".0%"}), axis(c, "", {rangemode: "tozero"})),
    numbers: table("Steps", [["share", format.percent], ["loss", format.fixed(4)], ["max over mean", format.fixed(2)],
      ["dropped", format.count], ["first choices of each expert", null, "text"]],
      steps.map((s) => [s.share, s.loss, s.max_over_mean, s.dropped, s.wanted.join(" ")])),
  });
  section("collapse", "Balance loss", element);
}

function hierarchySection() {
  const h = data.hierarchy, rows = h.inner.rows;
  const {element} = chart({
    title: "Rows of the experts of two levels",
    words: `${h.first_choice_slots} slots of first choices, ${h.second_choice_slots} of second ones, ${h.empty_slots} empty.`,
    traces: (c) => [{type: "heatmap", x: range(rows[0].length), y: range(rows.length), z: rows, colorscale: c.scale, zauto: false, zmin: 0,
      zmax: Math.max(1, ...rows.flat()),
      colorbar: {thickness: 10, outlinewidth: 0}, hovertemplate: "outer %{y}, inner %{x}<br>%{z} rows<extra></extra>"}],
    layout: (c) => layoutOf(c, axis(c, "inner expert", {dtick: 1}), axis(c, "outer expert", {dtick: 1})),
    numbers: el("div", {}, table("Levels", [["level", null, "text"], ["places"], ["dropped"], ["loss", format.fixed(4)]],
      [["outer", h.outer.capacity, h.outer.dropped, h.outer.loss], ["inner", h.inner.capacity, h.inner.dropped, h.inner.loss]]),
      table("Rows of the inner experts", [["outer expert"], ["rows", null, "text"]], rows.map((r, i) => [i, r.join(" ")]))),
  });
  section("hierarchy", "Two levels", element);
}

// Why the choices have their weights, and why the second expert stays or not.
function ruleOf({weights, chosen_by, policy}) {
  if (weights) return `Weights: ${weights}.${chosen_by ? ` Chosen by ${chosen_by}.` : ""}`;
  const asked = {threshold: (p) => `: it stays where ${p.gate_2.toFixed(4)} > ${p.threshold}`,
                 random: (p) => `: it stays where ${p.uniform.toFixed(4)} < ${p.gate_2.toFixed(4)} / ${p.threshold}`}[policy.policy];
  return `Weights: the two probabilities, divided by their sum. Second expert: ${policy.policy}${asked ? asked(policy) : ""}.`;
}

function stepSection(step) {
  const vector = (numbers) => `[${numbers.map((n) => n == null ? "nan" : n.toFixed(4)).join(", ")}${step.more ? ", …" : ""}]`;
  const place = (choice) => choice.place == null ? "–" : `${choice.place} of ${step.capacity}`;
  const rows = step.choices.map((c) => [`expert ${c.expert}`, c.probability, c.weight, c.fate, place(c), c.row ?? "–",
                                        c.output ? vector(c.output) : "–"]);
  if (step.shared) rows.push(["shared", null, step.shared.gate, "every token", "–", "–", vector(step.shared.output)]);
  const {before, at, after} = step.text || {};
  section("step", `Token ${step.token}`,
    step.text ? el("p", {}, el("span", {class: "sample"}, before, el("mark", {}, at), after)) : null,
    table(`From x = ${vector(step.x)} to ${vector(step.output)}, the sum of the outputs by weight`,
      [["choice", null, "text"], ["probability", format.fixed(4)], ["weight", format.fixed(4)], ["fate", null, "text"],
       ["place", null, "text"], ["row of the plan", null, "text"], ["the expert's output", null, "text"]], rows),
    note(ruleOf(step)),
    table("The gate", [["expert"], ["logit", format.fixed(4)], ["probability", format.fixed(4)]],
      step.logits.slice(0, 64).map((logit, e) => [e, logit, step.scores[e]])),
    step.logits.length > 64 ? note(`The first 64 of ${step.logits.length} experts.`) : null);
}

function layerSections() {
  const {trace, takers} = data.layer;
  const {element} = chart({
    title: "Rows of each expert",
    words: `The fullest has ${trace.max_over_mean.toFixed(2)} times the mean; ${trace.dead_experts} have none.`,
    traces: (c) => [{type: "bar", x: range(trace.experts), y: trace.rows, marker: {color: c.moe}}],
    layout: (c) => layoutOf(c, axis(c, "expert"), axis(c, "rows")),
    numbers: table("Rows", [["expert"], ["rows", format.count]], trace.rows.map((rows, e) => [e, rows])),
  });
  section("layer", "Load", element, table("The router", [["measure", null, "text"], ["value", null, "text"]], [
    ["choices dropped", `${format.count(trace.dropped)} of ${format.count(trace.choices)}`],
    ["entropy", `${trace.entropy.toFixed(3)} of at most ${trace.entropy_max.toFixed(3)} nats`],
    ["logits, root of the mean square", trace.logit_rms.toFixed(3)], ["logits, largest", trace.logit_max.toFixed(2)],
    [`balance loss (${trace.load_count})`, trace.balance_loss.toFixed(4)], ["z-loss", trace.z_loss.toFixed(4)]]));
  if (data.layer.step) stepSection(data.layer.step);
  section("capacity", "Capacity", el("div", {class: "grid"}, sweepCharts([[`layer ${trace.layer}`, trace.capacity]])));
  if (takers) section("takers", "What each expert takes", takersTable(trace.layer, takers));
  const {checkpoint, layer, router, input} = data.layer;
  section("configuration", "Configuration and hardware",
    optionTable("Layer", {checkpoint, layer, experts: trace.experts, top_k: trace.top_k, router, input}),
    optionTable("Machine", data.machine));
}

function exampleSections() {
  if (data.stages) stagesSection();
  if (data.tokens) tokensSection();
  if (data.step) stepSection(data.step);
  if (data.policies) policiesSection();
  if (data.capacity) section("capacity", "Capacity", el("div", {class: "grid"}, sweepCharts([["capacity", data.capacity]])));
  if (data.collapse) collapseSection();
  if (data.hierarchy) hierarchySection();
  section("configuration", "Configuration", optionTable("Options", data.options), optionTable("Machine", data.machine));
}
