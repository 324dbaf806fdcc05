"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const narrow = window.matchMedia("(max-width: 760px)");
  const config = {
    responsive: true,
    displaylogo: false,
    displayModeBar: narrow.matches ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d"],
    toImageButtonOptions: { format: "svg" },
    plotGlPixelRatio: Math.min(2, window.devicePixelRatio || 1),
    // newer versions of Plotly offer to send the data to its makers' server
    showSendToCloud: false,
    plotlyServerURL: "",
  };

  const webgl = (() => {
    try {
      return Boolean(document.createElement("canvas").getContext("webgl"));
    } catch {
      return false;
    }
  })();
  const SVG_POINTS = 4000; // of the plane, where the browser cannot draw with WebGL
  const DENSE = 5000; // points, above which they are smaller and more transparent

  const ARRAYS = { f4: Float32Array, i1: Int8Array, i4: Int32Array };
  const decode = ({ bdata, dtype }) => new ARRAYS[dtype](Uint8Array.from(atob(bdata), (char) => char.charCodeAt(0)).buffer);
  const decodeAll = (columns) =>
    Object.fromEntries(Object.entries(columns).map(([name, array]) => [name, array?.dtype ? decode(array) : array]));
  const { frames, names } = data.plane;
  const rows = decodeAll(data.plane.columns);
  const samples = decodeAll(data.samples);

  const rowsOfStep = new Map([[null, []], ...frames.map((frame) => [frame.step, []])]);
  rows.step.forEach((step, row) => {
    if (rows.last[row]) rowsOfStep.get(null).push(row);
    if (rowsOfStep.has(step)) rowsOfStep.get(step).push(row);
  });
  // in the order of drawing: kept on top of dropped, the middle first
  const groups = [0, 1]
    .flatMap((keep) => [0, 3, 1, 2, 4].map((quadrant) => ({ keep, quadrant })))
    .filter(({ keep, quadrant }) => rows.quadrant.some((each, row) => each === quadrant && rows.keep[row] === keep));
  const groupName = ({ keep, quadrant }) => (names[quadrant] ? `${names[quadrant]}, ` : "") + (keep ? "kept" : "dropped");
  const trace = (group, chosen) => {
    const colour = data.colours[group.quadrant];
    const dense = chosen.length > DENSE;
    const points = chosen.filter((row) => rows.quadrant[row] === group.quadrant && rows.keep[row] === group.keep);
    return {
      type: webgl ? "scattergl" : "scatter",
      mode: "markers",
      name: groupName(group),
      x: points.map((row) => rows.ppl[row]),
      y: points.map((row) => rows.entropy[row]),
      customdata: points,
      showlegend: true,
      marker: {
        color: colour,
        symbol: group.keep ? "circle" : "x-thin-open",
        size: (group.keep ? 7 : 6) - 2 * dense,
        opacity: 0.9 - 0.3 * dense,
        line: { width: 1, color: colour },
      },
      hovertemplate: "%{fullData.name}<br>perplexity %{x:.4g}<br>entropy %{y:.4g} nats<extra></extra>",
    };
  };
  const border = ([name, value]) => {
    const [across, along] = name.startsWith("ppl") ? ["x", "y"] : ["y", "x"];
    const dash = name.endsWith("high") ? "dash" : "dot";
    return {
      ...{ type: "line", name, line: { color: data.colours[0], width: 1.5, dash } },
      ...{ [`${across}0`]: value, [`${across}1`]: value, [`${along}0`]: 0, [`${along}1`]: 1, [`${along}ref`]: "paper" },
    };
  };

  let theme = window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const layoutOf = (figure) => {
    const layout = { ...figure.layout, template: data.themes[theme], autosize: true };
    if (narrow.matches) layout.height += 18 * (figure.data.length || groups.length); // the legend has one entry a line there
    return layout;
  };

  let current = 0;
  const number = (value) => value.toLocaleString("en");
  const drawPlane = () => {
    const frame = frames[current];
    const all = rowsOfStep.get(frame.step);
    const every = webgl ? 1 : Math.max(1, Math.ceil(all.length / SVG_POINTS));
    const chosen = every === 1 ? all : all.filter((_, index) => index % every === 0);
    byId("frame-label").textContent = frame.label;
    byId("frame").setAttribute("aria-valuetext", frame.label);
    const parts = [
      chosen.length < frame.total
        ? `Drawn: ${number(chosen.length)} of ${number(frame.total)} samples, a fixed choice` +
          (webgl ? "." : ", because this browser has no WebGL.")
        : `${number(frame.total)} samples${frames.length > 1 && frame.step === null ? ", each where it was scored last" : ""}.`,
    ];
    if (frame.alpha !== null) parts.push(`α = ${frame.alpha.toPrecision(3)}.`);
    if (frame.alpha !== null && !("ppl_low" in frame.thresholds)) {
      parts.push("No thresholds: several pools with their own, or tied values.");
    }
    byId("frame-note").textContent = parts.join(" ");
    byId("hovered").replaceChildren(line("quiet", "Point at a sample, or tap it, to see its text."));
    const layout = { ...layoutOf(data.figures.plane), shapes: Object.entries(frame.thresholds).map(border) };
    return Plotly.react("chart-plane", groups.map((group) => trace(group, chosen)), layout, config);
  };

  const line = (className, text) => {
    const paragraph = document.createElement("p");
    paragraph.className = className;
    paragraph.textContent = text;
    return paragraph;
  };
  const textOf = (sample) =>
    samples.prompt[sample] === null
      ? [line("quiet", "No text was recorded for this sample.")]
      : [line("prompt", samples.prompt[sample]), line("answer", samples.answer[sample])];
  const showSample = (event) => {
    const point = event.points[0];
    const row = point.customdata;
    const [sample, kept, all] = [rows.sample[row], rows.kept_tokens[row], rows.num_tokens[row]];
    const counts = kept < 0 ? `${all} answer tokens` : `${kept} of ${all} answer tokens kept`;
    const lines = [
      line("meta", `${samples.id[sample]}${rows.step[row] > 0 ? `, scored in step ${rows.step[row]}` : ""}`),
      line("meta", `perplexity ${rows.ppl[row].toPrecision(4)}, entropy ${rows.entropy[row].toPrecision(4)} nats`),
      line("meta", `${point.data.name}; ${counts}`),
    ];
    if (rows.supplemented[row] === 1) {
      const why = "Kept as a supplement, because Q2 and Q4 held too few of its pool";
      lines.push(line("meta", `${why}; treated as Q${rows.role[row]}, to which it leans.`));
    }
    lines.push(...textOf(sample));
    byId("hovered").replaceChildren(...lines);
  };

  // the other charts are drawn when they come near the window
  const drawn = new Set();
  const drawOther = (name) => {
    const figure = data.figures[name];
    drawn.add(name);
    return Plotly.react(`chart-${name}`, figure.data, layoutOf(figure), config);
  };
  const near = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        near.unobserve(entry.target);
        drawOther(entry.target.id.replace("chart-", ""));
      }
    },
    { rootMargin: "400px" },
  );

  const applyTheme = () => {
    document.documentElement.dataset.theme = theme;
    byId("theme").textContent = theme === "dark" ? "Light" : "Dark";
  };
  byId("theme").addEventListener("click", () => {
    theme = theme === "dark" ? "light" : "dark";
    applyTheme();
    if (frames.length) drawPlane();
    drawn.forEach(drawOther);
  });
  applyTheme();

  const search = (section) => {
    const input = section.querySelector("input[type=search]");
    const role = section.querySelector("select[data-role]");
    const found = section.querySelector("[data-found]");
    const entries = [...section.querySelectorAll("[data-searchable]")].map((element) => [element, element.textContent.toLowerCase()]);
    const filter = () => {
      const wanted = input.value.trim().toLowerCase();
      let shown = 0;
      for (const [element, text] of entries) {
        element.hidden = !text.includes(wanted) || (role && role.value !== "" && element.dataset.role !== role.value);
        if (!element.hidden) shown += 1;
      }
      found.textContent = `${shown} of ${entries.length} samples`;
    };
    input.addEventListener("input", filter);
    if (role) role.addEventListener("change", filter);
    filter();
  };
  document.querySelectorAll("section:has([data-found])").forEach(search);

  // the list of all samples, a page at a time
  const PAGE = 20;
  const filters = byId("filters");
  const ordered = Array.from(samples.id.keys()).sort((a, b) => (samples.ppl[b] || 0) - (samples.ppl[a] || 0));
  const searched = samples.id.map((id, i) => `${id}\n${samples.prompt[i] ?? ""}\n${samples.answer[i] ?? ""}`.toLowerCase());
  const keptAs = (i) => (samples.kept[i] === 0 ? "never" : samples.kept[i] === samples.seen[i] ? "always" : "times");
  const entry = (i) => {
    const item = document.createElement("li");
    item.className = "sample";
    const value = (x) => (Number.isFinite(x) ? x.toPrecision(3) : "–");
    const parts = [`perplexity ${value(samples.ppl[i])}`, `entropy ${value(samples.entropy[i])}`];
    if (names[samples.quadrant[i]]) parts.push(names[samples.quadrant[i]]);
    if (data.kind === "run") parts.push(`seen ${samples.seen[i]}×, kept ${samples.kept[i]}×`);
    if (samples.supplemented[i]) parts.push(data.kind === "run" ? `${samples.supplemented[i]}× as a supplement` : "supplemented");
    if (samples.tag[i]) parts.push(samples.tag[i]);
    item.append(line("meta", `${samples.id[i]} · ${parts.join(" · ")}`), ...textOf(i));
    return item;
  };
  let found = [];
  let first = 0;
  const showPage = (start) => {
    first = start;
    const last = Math.min(first + PAGE, found.length);
    byId("list").replaceChildren(...found.slice(first, last).map(entry));
    byId("list").scrollTop = 0;
    byId("found").textContent = found.length ? `${number(first + 1)}–${number(last)} of ${number(found.length)} samples` : "No sample.";
    byId("previous").disabled = first === 0;
    byId("next").disabled = last === found.length;
  };
  const find = () => {
    const wanted = Object.fromEntries(new FormData(filters));
    const words = wanted.search.trim().toLowerCase();
    found = ordered.filter(
      (i) =>
        searched[i].includes(words) &&
        (!wanted.kept || keptAs(i) === wanted.kept) &&
        (!wanted.quadrant || samples.quadrant[i] === Number(wanted.quadrant)) &&
        (!wanted.tag || samples.tag[i] === wanted.tag),
    );
    showPage(0);
  };
  filters.addEventListener("input", find);
  filters.addEventListener("submit", (event) => event.preventDefault());
  byId("previous").addEventListener("click", () => showPage(first - PAGE));
  byId("next").addEventListener("click", () => showPage(first + PAGE));
  find();

  // a token's numbers, by pointing, touch or keyboard
  const chooseToken = (token) => {
    document.querySelector(".chosen")?.classList.remove("chosen");
    token.classList.add("chosen");
    token.scrollIntoView({ block: "nearest" });
    byId("token").textContent = `“${token.textContent.trim()}”: ${token.title}`;
  };
  byId("tokens")?.addEventListener("click", ({ target }) => target.title && chooseToken(target));
  byId("tokens")?.addEventListener("keydown", (event) => {
    const move = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    if (!move || !event.target.matches(".answer")) return;
    event.preventDefault();
    const chosen = event.target.querySelector(".chosen");
    const token = chosen ? chosen[move] : event.target.firstElementChild;
    if (token) chooseToken(token);
  });

  const finish = () => {
    document.documentElement.dataset.ready = String(Math.round(performance.now()));
    document.querySelectorAll(".chart:not(#chart-plane)").forEach((chart) => near.observe(chart));
  };
  if (!frames.length) {
    finish();
    return;
  }

  const slider = byId("frame");
  slider.max = String(frames.length - 1);
  slider.addEventListener("input", () => {
    current = Number(slider.value);
    drawPlane();
  });
  let timer = null;
  const stop = () => {
    clearInterval(timer);
    timer = null;
    byId("play").textContent = "▶";
  };
  byId("play").addEventListener("click", () => {
    if (timer) return stop();
    byId("play").textContent = "⏸";
    if (current === frames.length - 1) current = 0;
    const stride = Math.ceil(frames.length / 60);
    timer = setInterval(() => {
      current = Math.min(current + stride, frames.length - 1);
      slider.value = String(current);
      drawPlane();
      if (current === frames.length - 1) stop();
    }, 700);
  });
  slider.addEventListener("pointerdown", stop);

  drawPlane().then((plot) => {
    plot.on("plotly_hover", showSample);
    plot.on("plotly_click", showSample);
    setTimeout(finish);
  });
})();
