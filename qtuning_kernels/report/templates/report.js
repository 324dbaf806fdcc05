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

  const ARRAYS = { f4: Float32Array, f8: Float64Array, i1: Int8Array, u1: Uint8Array, i2: Int16Array, i4: Int32Array };
  const decode = (array) => {
    if (!array || !array.bdata) return Array.from(array || []);
    const bytes = Uint8Array.from(atob(array.bdata), (char) => char.charCodeAt(0));
    return Array.from(new ARRAYS[array.dtype](bytes.buffer));
  };

  // without WebGL every n-th point of each trace is drawn as SVG, which says so below the slider
  const drawable = (figure) => {
    if (webgl) return { traces: figure.data, shown: null };
    const decoded = figure.data.map((trace) => ({ x: decode(trace.x), y: decode(trace.y), custom: decode(trace.customdata) }));
    const total = decoded.reduce((sum, trace) => sum + trace.x.length, 0);
    const every = Math.max(1, Math.ceil(total / SVG_POINTS));
    let shown = 0;
    const traces = figure.data.map((trace, index) => {
      const { x, y, custom } = decoded[index];
      const width = custom.length / x.length;
      const chosen = x.map((_, point) => point).filter((point) => point % every === 0);
      shown += chosen.length;
      return {
        ...trace,
        type: "scatter",
        x: chosen.map((point) => x[point]),
        y: chosen.map((point) => y[point]),
        customdata: chosen.map((point) => custom.slice(width * point, width * (point + 1))),
      };
    });
    return { traces, shown };
  };

  let theme = window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const layoutOf = (figure) => {
    const layout = { ...figure.layout, template: data.themes[theme], autosize: true };
    if (narrow.matches) layout.height += 18 * figure.data.length; // the legend has one entry a line there
    return layout;
  };

  const frames = data.figures.plane || [];
  let current = 0;
  const drawPlane = () => {
    const { traces, shown } = drawable(frames[current]);
    const frame = data.frames[current];
    byId("frame-label").textContent = frame.label;
    const drawn = shown === null ? frame.shown : shown;
    const parts = [];
    if (drawn < frame.total) {
      parts.push(`Drawn: ${drawn.toLocaleString("en")} of ${frame.total.toLocaleString("en")} samples, a fixed choice` +
        (shown === null ? "." : ", because this browser has no WebGL."));
    } else {
      parts.push(`${frame.total.toLocaleString("en")} samples, each where it was scored last.`);
    }
    if (frame.steps > 1) parts.push(`Thresholds: medians of ${frame.steps.toLocaleString("en")} steps.`);
    byId("frame-note").textContent = parts.join(" ");
    return Plotly.react("chart-plane", traces, layoutOf(frames[current]), config);
  };

  const line = (className, text) => {
    const paragraph = document.createElement("p");
    paragraph.className = className;
    paragraph.textContent = text;
    return paragraph;
  };
  const showSample = (event) => {
    const point = event.points[0];
    const [sample, step, kept, all, role, supplemented] = point.customdata;
    const samples = data.samples;
    const counts = kept < 0 ? `${all} answer tokens` : `${kept} of ${all} answer tokens kept`;
    const lines = [
      line("meta", `${samples.id[sample]}${step > 0 ? `, scored in step ${step}` : ""}`),
      line("meta", `perplexity ${Number(point.x).toPrecision(4)}, entropy ${Number(point.y).toPrecision(4)} nats`),
      line("meta", `${point.data.name}${supplemented ? ` as a supplement, treated as Q${role}` : ""}; ${counts}`),
    ];
    if (samples.prompt[sample] === null) {
      lines.push(line("quiet", "No text was recorded for this sample."));
    } else {
      lines.push(line("prompt", samples.prompt[sample]), line("answer", samples.answer[sample]));
    }
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
  document.querySelectorAll("section:has(input[type=search])").forEach(search);

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
  if (frames.length < 2) slider.closest(".slider").hidden = true;
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
    timer = setInterval(() => {
      current += 1;
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
