"use strict";
// The browser of rollouts.  Whatever comes from data is set as text, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const MOST_GROUPS = 200;   // in the list; filters show the others
  const DARKEST = 5;         // nats of surprise

  function make(tag, properties, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children.filter((child) => child !== null));
    return element;
  }
  const joined = (numbers) => numbers.map((number) => data.texts[number]).join("");
  const number = (value) => value === undefined ? "not known" : String(Number(value.toPrecision(4))).replace("-", "−");

  for (const group of data.groups) {
    group.text = joined(group.prompt);
    group.samples.forEach((sample, place) => {
      sample.text = joined(sample.response);
      sample.sought = (group.text + "\n" + sample.text).toLowerCase();
      sample.group = group;
      sample.place = place;
    });
    const rewards = group.samples.map((sample) => sample.reward).filter((reward) => reward !== undefined);
    group.best = Math.max(...rewards) > Math.min(...rewards) ? Math.max(...rewards) : undefined;
    group.mean = rewards.length ? rewards.reduce((sum, reward) => sum + reward, 0) / rewards.length : undefined;
  }

  let opened = null;

  function options(select, what, pairs) {
    select.replaceChildren(make("option", { value: "", textContent: `all ${what}` }));
    for (const [value, text] of pairs) select.append(make("option", { value, textContent: text }));
  }

  function offerSteps() {
    const run = find("filter-run").value, before = find("filter-step").value;
    const groups = data.groups.filter((group) => run === "" || group.run === Number(run));
    const steps = [...new Set(groups.map((group) => group.step))].sort((a, b) => a - b);
    options(find("filter-step"), "steps", steps.map((step) => [step, step]));
    if (steps.includes(Number(before)) && before !== "") find("filter-step").value = before;
  }

  function accepted() {
    const value = (id) => find(id).value;
    const run = value("filter-run"), step = value("filter-step"), text = value("filter-text").toLowerCase();
    const low = value("filter-low") === "" ? -Infinity : Number(value("filter-low"));
    const high = value("filter-high") === "" ? Infinity : Number(value("filter-high"));
    const bounded = low > -Infinity || high < Infinity;
    return data.groups
      .filter((group) => (run === "" || group.run === Number(run)) && (step === "" || group.step === Number(step)))
      .map((group) => group.samples.filter((sample) =>
        (!bounded || (sample.reward !== undefined && sample.reward >= low && sample.reward <= high)) &&
        (text === "" || sample.sought.includes(text))))
      .filter((samples) => samples.length > 0);
  }

  function chip(sample) {
    const best = sample.group.best !== undefined && sample.reward === sample.group.best;
    const button = make("button", {
      type: "button", className: best ? "chip best" : "chip",
      textContent: sample.reward === undefined ? `sample ${sample.place + 1}` : number(sample.reward),
      title: `sample ${sample.place + 1}, ${sample.tokens} tokens`,
    });
    button.setAttribute("aria-pressed", String(sample === opened));
    button.addEventListener("click", () => open(sample));
    button.sample = sample;
    return button;
  }

  function list() {
    const found = accepted();
    const entries = found.slice(0, MOST_GROUPS).map((samples) => {
      const group = samples[0].group;
      const mean = group.mean === undefined ? "" : ` · mean reward ${number(group.mean)}`;
      return make("div", { className: "group" },
        make("div", { className: "where", textContent: `${data.runs[group.run]} · step ${group.step}${mean}` }),
        make("div", { className: "text", textContent: group.text }),
        make("div", { className: "chips" }, ...samples.map(chip)));
    });
    if (!entries.length) {
      entries.push(make("div", { className: "nothing", textContent: "No sample passes these filters." }));
    } else if (found.length > MOST_GROUPS) {
      const text = `${found.length - MOST_GROUPS} more prompts; use the filters to see them.`;
      entries.push(make("div", { className: "nothing", textContent: text }));
    }
    find("list").replaceChildren(...entries);
    const all = data.groups.reduce((sum, group) => sum + group.samples.length, 0);
    const shown = found.reduce((sum, samples) => sum + samples.length, 0);
    find("count").textContent = `${shown} of ${all} samples, ${found.length} of ${data.groups.length} prompts`;
    return found;
  }

  function shade(logProb) {
    const surprise = Math.min(1, Math.max(0, -logProb / DARKEST));
    return `rgba(213, 94, 0, ${(0.72 * surprise).toFixed(3)})`;
  }

  function tokens(kind, numbers, total, logProbs, isCut) {
    const box = make("div", { className: `text ${kind}` });
    const missing = total - numbers.length, half = data.kept / 2;
    numbers.forEach((textNumber, place) => {
      if (missing > 0 && place === half) {
        box.append(make("span", { className: "gap", textContent: `\n… ${missing} tokens are left out …\n` }));
      }
      let text = data.texts[textNumber];
      const isLast = place === numbers.length - 1;
      if (text === "" && isLast && isCut === false) text = "■";
      const span = make("span", { className: "token", textContent: text });
      const position = missing > 0 && place >= half ? place + missing + 1 : place + 1;
      span.title = `token ${position}`;
      if (logProbs) {
        const logProb = logProbs[place] / 100;
        span.style.backgroundColor = shade(logProb);
        span.title += `: log π = ${number(logProb)} nats, π = ${Math.exp(logProb).toPrecision(2)}`;
      }
      if (text === "■") span.title += " (stop token)";
      box.append(span);
    });
    return box;
  }

  function legend() {
    const steps = [0, 1, 2, 3, 5].map((nats) => {
      const span = make("span", { textContent: nats === DARKEST ? "≤ 0.007" : Math.exp(-nats).toPrecision(2) });
      span.style.backgroundColor = shade(-nats);
      return span;
    });
    return make("div", { className: "legend" }, "probability π of the token when it was drawn:", ...steps);
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
      const button = make("button", { type: "button", className: "chip", textContent: sample.place + 1 });
      button.setAttribute("aria-pressed", String(sample === opened));
      button.addEventListener("click", () => open(sample));
      return make("tr", { className: sample === opened ? "open" : "" }, make("td", {}, button),
        make("td", { className: "number", textContent: number(sample.reward) }),
        make("td", { className: "number", textContent: number(sample.advantage) }),
        make("td", { className: "number", textContent: sample.tokens }),
        make("td", { className: "text", textContent: start }));
    });
    return make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
  }

  function open(sample) {
    opened = sample;
    const group = sample.group;
    const where = `${data.runs[group.run]}, step ${group.step}, prompt ${group.prompt_id}, ` +
      `sample ${sample.place + 1} of ${group.samples.length}`;
    const known = sample.log_probs !== undefined;
    find("sample").replaceChildren(...[
      make("h3", { textContent: where }),
      facts([
        ["reward", number(sample.reward)],
        ["advantage", number(sample.advantage)],
        ["length", `${sample.tokens} tokens${sample.cut ? ", cut at the limit" : ""}`],
        ["log π of the response", known ? `${number(sample.log_prob)} nats` : "not recorded"],
        ["per token", known && sample.tokens ? `${number(sample.log_prob / sample.tokens)} nats` : "not recorded"],
      ]),
      make("h4", { textContent: "prompt" }),
      tokens("prompt", group.prompt, group.prompt_tokens),
      make("h4", { textContent: "response" }),
      tokens("response", sample.response, sample.tokens, sample.log_probs, sample.cut),
      known ? legend() : null,
      make("h4", { textContent: "all samples of this prompt" }),
      siblings(group),
    ].filter((part) => part !== null));
    for (const button of find("list").querySelectorAll(".chip")) {
      button.setAttribute("aria-pressed", String(button.sample === opened));
    }
  }

  if (data.groups.length) {
    options(find("filter-run"), "runs", data.runs.map((name, place) => [place, name]));
    offerSteps();
    find("filter-run").addEventListener("change", offerSteps);
    for (const id of ["filter-run", "filter-step", "filter-low", "filter-high", "filter-text"]) {
      find(id).addEventListener("input", list);
    }
    document.querySelector(".controls").addEventListener("submit", (event) => event.preventDefault());
    find("browser").hidden = false;
    open(list()[0][0]);
  }
})();
