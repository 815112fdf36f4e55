"use strict";
// The rollout browser.  All data is inserted as text, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const MAX_GROUPS = 200;   // in the list; filters show the others
  const MAX_NLL = 5;        // nats; the darkest shade

  function make(tag, properties, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children.filter((child) => child !== null));
    return element;
  }
  const joined = (indices) => indices.map((index) => data.texts[index]).join("");
  const number = (value) => value === undefined ? "unknown" : String(Number(value.toPrecision(4))).replace("-", "−");

  for (const group of data.groups) {
    group.text = joined(group.prompt);
    group.samples.forEach((sample, index) => {
      sample.text = joined(sample.response);
      sample.searchable = (group.text + "\n" + sample.text).toLowerCase();
      sample.group = group;
      sample.index = index;
    });
    const rewards = group.samples.map((sample) => sample.reward).filter((reward) => reward !== undefined);
    group.best = Math.max(...rewards) > Math.min(...rewards) ? Math.max(...rewards) : undefined;
    group.mean = rewards.length ? rewards.reduce((sum, reward) => sum + reward, 0) / rewards.length : undefined;
  }

  let selected = null;

  function setOptions(select, what, pairs) {
    select.replaceChildren(make("option", { value: "", textContent: `all ${what}` }));
    for (const [value, text] of pairs) select.append(make("option", { value, textContent: text }));
  }

  function updateSteps() {
    const run = find("filter-run").value, before = find("filter-step").value;
    const groups = data.groups.filter((group) => run === "" || group.run === Number(run));
    const steps = [...new Set(groups.map((group) => group.step))].sort((a, b) => a - b);
    setOptions(find("filter-step"), "steps", steps.map((step) => [step, step]));
    if (steps.includes(Number(before)) && before !== "") find("filter-step").value = before;
  }

  function filtered() {
    const value = (id) => find(id).value;
    const run = value("filter-run"), step = value("filter-step"), text = value("filter-text").toLowerCase();
    const low = value("filter-low") === "" ? -Infinity : Number(value("filter-low"));
    const high = value("filter-high") === "" ? Infinity : Number(value("filter-high"));
    const bounded = low > -Infinity || high < Infinity;
    return data.groups
      .filter((group) => (run === "" || group.run === Number(run)) && (step === "" || group.step === Number(step)))
      .map((group) => group.samples.filter((sample) =>
        (!bounded || (sample.reward !== undefined && sample.reward >= low && sample.reward <= high)) &&
        (text === "" || sample.searchable.includes(text))))
      .filter((samples) => samples.length > 0);
  }

  function chip(sample) {
    const best = sample.group.best !== undefined && sample.reward === sample.group.best;
    const button = make("button", {
      type: "button", className: best ? "chip best" : "chip",
      textContent: sample.reward === undefined ? `sample ${sample.index + 1}` : number(sample.reward),
      title: `sample ${sample.index + 1}, ${sample.tokens} tokens`,
    });
    button.setAttribute("aria-pressed", String(sample === selected));
    button.addEventListener("click", () => open(sample));
    button.sample = sample;
    return button;
  }

  function list() {
    const matching = filtered();
    const entries = matching.slice(0, MAX_GROUPS).map((samples) => {
      const group = samples[0].group;
      const mean = group.mean === undefined ? "" : ` · mean reward ${number(group.mean)}`;
      return make("div", { className: "group" },
        make("div", { className: "where", textContent: `${data.runs[group.run]} · step ${group.step}${mean}` }),
        make("div", { className: "text", textContent: group.text }),
        make("div", { className: "chips" }, ...samples.map(chip)));
    });
    if (!entries.length) {
      entries.push(make("div", { className: "nothing", textContent: "No sample matches these filters." }));
    } else if (matching.length > MAX_GROUPS) {
      const text = `${matching.length - MAX_GROUPS} more prompts; use the filters to see them.`;
      entries.push(make("div", { className: "nothing", textContent: text }));
    }
    find("list").replaceChildren(...entries);
    const all = data.groups.reduce((sum, group) => sum + group.samples.length, 0);
    const shown = matching.reduce((sum, samples) => sum + samples.length, 0);
    find("count").textContent = `${shown} of ${all} samples, ${matching.length} of ${data.groups.length} prompts`;
    return matching;
  }

  function shade(logProb) {
    const nll = Math.min(1, Math.max(0, -logProb / MAX_NLL));
    return `rgba(213, 94, 0, ${(0.72 * nll).toFixed(3)})`;
  }

  function tokens(kind, indices, total, logProbs, isTruncated, given = []) {
    const box = make("div", { className: `text ${kind}` });
    const missing = total - indices.length, half = data.kept / 2;
    indices.forEach((textIndex, index) => {
      if (missing > 0 && index === half) {
        box.append(make("span", { className: "gap", textContent: `\n… ${missing} tokens are left out …\n` }));
      }
      let text = data.texts[textIndex];
      const isLast = index === indices.length - 1;
      const endsTurn = !given[index] && given[index + 1];
      if (text === "" && (endsTurn || (isLast && isTruncated === false))) text = "■";
      const span = make("span", { className: given[index] ? "token given" : "token", textContent: text });
      const position = missing > 0 && index >= half ? index + missing + 1 : index + 1;
      span.title = `token ${position}`;
      if (given[index]) span.title += ": given by the environment";
      else if (logProbs) {
        const logProb = logProbs[index] / 100;
        span.style.backgroundColor = shade(logProb);
        span.title += `: log π = ${number(logProb)} nats, π = ${Math.exp(logProb).toPrecision(2)}`;
      }
      if (text === "■") span.title += " (stop token)";
      box.append(span);
    });
    return box;
  }

  function legend(sample) {
    const steps = [0, 1, 2, 3, 5].map((nats) => {
      const span = make("span", { textContent: nats === MAX_NLL ? "≤ 0.007" : Math.exp(-nats).toPrecision(2) });
      span.style.backgroundColor = shade(-nats);
      return span;
    });
    const given = sample.given ? ["underlined: given by the environment, not sampled"] : [];
    return make("div", { className: "legend" }, "probability π with which the token was sampled:", ...steps, ...given);
  }

  function facts(pairs) {
    return make("dl", {}, ...pairs.map(([name, value]) =>
      make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }))));
  }

  function siblings(group) {
    const head = make("tr", {}, ...["sample", "reward", "advantage", "tokens", "response"].map((name) =>
      make("th", { scope: "col", textContent: name })));
    const rows = group.samples.map((sample) => {
      const start = sample.text.length > 160 ? sample.text.slice(0, 160) + "…" : sample.text;
      const button = make("button", { type: "button", className: "chip", textContent: sample.index + 1 });
      button.setAttribute("aria-pressed", String(sample === selected));
      button.addEventListener("click", () => open(sample));
      return make("tr", { className: sample === selected ? "open" : "" }, make("td", {}, button),
        make("td", { className: "number", textContent: number(sample.reward) }),
        make("td", { className: "number", textContent: number(sample.advantage) }),
        make("td", { className: "number", textContent: sample.tokens }),
        make("td", { className: "text", textContent: start }));
    });
    return make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
  }

  function open(sample) {
    selected = sample;
    const group = sample.group;
    const where = `${data.runs[group.run]}, step ${group.step}, prompt ${group.prompt_id}, ` +
      `sample ${sample.index + 1} of ${group.samples.length}`;
    const hasLogProbs = sample.log_probs !== undefined;
    find("sample").replaceChildren(...[
      make("h3", { textContent: where }),
      facts([
        ["reward", number(sample.reward)],
        ["advantage", number(sample.advantage)],
        ["length", `${sample.tokens} tokens${sample.truncated ? ", truncated" : ""}`],
        ...(sample.turns === undefined ? [] : [
          ["turns", `${sample.turns}, ended by ${sample.ended_by}`],
          ["given", `${sample.given_tokens} tokens`],
        ]),
        ["log π of the response", hasLogProbs ? `${number(sample.log_prob)} nats` : "not recorded"],
        ["per token", hasLogProbs && sample.tokens ? `${number(sample.log_prob / sample.tokens)} nats` : "not recorded"],
      ]),
      make("h4", { textContent: "prompt" }),
      tokens("prompt", group.prompt, group.prompt_tokens),
      make("h4", { textContent: "response" }),
      tokens("response", sample.response, sample.tokens + (sample.given_tokens || 0), sample.log_probs,
        sample.truncated, sample.given),
      hasLogProbs ? legend(sample) : null,
      make("h4", { textContent: "all samples of this prompt" }),
      siblings(group),
    ].filter((part) => part !== null));
    for (const button of find("list").querySelectorAll(".chip")) {
      button.setAttribute("aria-pressed", String(button.sample === selected));
    }
  }

  if (data.groups.length) {
    setOptions(find("filter-run"), "runs", data.runs.map((name, index) => [index, name]));
    updateSteps();
    find("filter-run").addEventListener("change", updateSteps);
    for (const id of ["filter-run", "filter-step", "filter-low", "filter-high", "filter-text"]) {
      find(id).addEventListener("input", list);
    }
    document.querySelector(".controls").addEventListener("submit", (event) => event.preventDefault());
    find("browser").hidden = false;
    open(list()[0][0]);
  }
})();
