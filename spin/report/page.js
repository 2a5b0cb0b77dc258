"use strict";
// Draws the charts of the page's data; with `spin report --watch`, asks for what is new.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const boxes = document.querySelectorAll(".charts"), slider = document.getElementById("smoothing"), FIRST = 3;
  const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const shown = value => value == null ? "" : String(+value.toPrecision(4));
  const STEPS = [1, 2, 5].flatMap(n => [...Array(12).keys()].map(power => n * 10 ** power)).sort((a, b) => a - b);
  let plots = [];

  // an exponential mean that starts again at a gap, which is where an iteration ends
  const smoothed = values => {
    let mean = null;
    return values.map(value => mean = value == null ? null : mean == null ? value : slider.value * mean + (1 - slider.value) * value);
  };

  // each line of each run: what is drawn, and the range behind it
  const columns = chart => uPlot.join(data.runs.map(run => [run.x, ...chart.lines.flatMap(([metric, , isDots]) => {
    const values = run.y[metric] || run.x.map(() => null);
    return [isDots ? values : smoothed(values), (run.low || run.y)[metric] || values, (run.high || run.y)[metric] || values];
  })]));

  function options(chart) {
    const series = [{label: "step"}], bands = [], isOne = data.runs.length === 1;
    data.runs.forEach((run, r) => chart.lines.forEach(([, label, isDots], l) => {
      const stroke = colour(`--s${(isOne ? l : r) % 6}`), behind = {class: "behind", stroke: stroke + "59", width: 1, spanGaps: !!isDots, points: {show: false}};
      bands.push({series: [series.length + 2, series.length + 1], fill: stroke + "26"});
      series.push({
        label: isOne ? label : `${run.name}, ${label}`, stroke, width: 2, spanGaps: !!isDots, dash: isOne || !l ? [] : [6, 3],
        points: isDots ? {show: true, size: 6, fill: stroke} : {},
        // at a step without a value, or with no step under the cursor: the last one before it
        value: (u, value, s, i) => { for (i ??= u.data[0].length - 1; i > 0 && u.data[s][i] == null;) i--; return shown(u.data[s][i]); },
      }, behind, behind);
    }));
    const axis = {stroke: colour("--soft"), grid: {stroke: colour("--rule"), width: 1}, ticks: {show: false}, font: "11px system-ui, sans-serif"};
    series[0].value = (u, step) => step == null ? `${u.data[0].at(-1)}` : `${Math.ceil(step)}`;
    return {
      width: 300, height: 200, series, bands, padding: [18, 10, 0, 0],
      cursor: {y: false, sync: {key: "steps"}},
      scales: {x: {time: false}, y: {range: (u, low, high) => uPlot.rangeNum(Math.min(low, chart.level?.[0] ?? low), Math.max(high, chart.level?.[0] ?? high), 0.1, true)}},
      axes: [{...axis, size: 28, incrs: STEPS}, {...axis, size: 56, values: (u, ticks) => ticks.map(shown)}],
      hooks: {drawAxes: [u => drawMarks(u, chart)]},
    };
  }

  // where iterations begin, and the level that a chart is read against
  function drawMarks(u, chart) {
    const {ctx, bbox} = u, ratio = devicePixelRatio;
    const line = (x0, y0, x1, y1, dash) => {
      ctx.setLineDash(dash.map(n => n * ratio));
      ctx.beginPath(); ctx.moveTo(x0, y0); ctx.lineTo(x1, y1); ctx.stroke();
    };
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = colour("--soft");
    ctx.lineWidth = ratio;
    ctx.font = `${11 * ratio}px system-ui, sans-serif`;
    ctx.textAlign = "left"; ctx.textBaseline = "alphabetic";
    for (const [step, label] of new Map(data.runs.flatMap(run => run.marks)))
      if (step >= u.scales.x.min && step <= u.scales.x.max) {
        const x = u.valToPos(step, "x", true);
        line(x, bbox.top, x, bbox.top + bbox.height, [2, 3]);
        ctx.fillText(label, x + 3 * ratio, bbox.top - 4 * ratio);
      }
    if (chart.level) {
      const y = u.valToPos(chart.level[0], "y", true);
      line(bbox.left, y, bbox.left + bbox.width, y, [6, 4]);
    }
    ctx.restore();
  }

  function describe({plot, chart}) {
    const values = plot.series.map((s, i) => s.class || !i ? "" : `${s.label} ${s.value(plot, null, i, null)}`).filter(Boolean);
    plot.ctx.canvas.setAttribute("aria-label", `${chart.title}: ${values.join(", ")}`);
  }

  function draw() {
    plots.forEach(({plot}) => plot.destroy());
    boxes.forEach(box => box.replaceChildren());
    plots = data.charts.map((chart, i) => {
      const figure = document.createElement("figure"), caption = document.createElement("figcaption");
      const level = document.createElement("small");
      level.textContent = chart.level ? ` dashed: ${chart.level[1]}` : "";
      caption.append(chart.title, level);
      figure.append(caption);
      boxes[+(i >= FIRST)].append(figure);
      const plot = new uPlot(options(chart), columns(chart), figure);
      plot.ctx.canvas.setAttribute("role", "img");
      describe({plot, chart});
      return {plot, chart};
    });
    resize();
  }

  function refresh() {
    for (const {plot, chart} of plots) {
      const {min, max} = plot.scales.x, isZoomed = min > plot.data[0][0] || max < plot.data[0].at(-1);
      plot.setData(columns(chart), !isZoomed);
      if (isZoomed) plot.redraw(true);
      describe({plot, chart});
    }
  }

  function resize() {
    for (const {plot} of plots) {
      const style = getComputedStyle(plot.root.parentNode);
      plot.setSize({width: plot.root.parentNode.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight), height: 200});
    }
  }

  function take(news) {
    for (const [id, html] of Object.entries(news.sections)) {
      const section = document.getElementById(id), open = [...section.querySelectorAll("details")].map(each => each.open);
      section.innerHTML = html;
      section.querySelectorAll("details").forEach((each, i) => { if (i < open.length) each.open = open[i]; });
    }
    news.runs.forEach(({from, ...run}, i) => {
      const old = data.runs[i];
      const append = (before, more) => from ? before.slice(0, from).concat(more) : more;
      run.x = append(old.x, run.x);
      for (const kind of ["y", "low", "high"])
        for (const metric in run[kind] || {}) run[kind][metric] = append(old[kind]?.[metric], run[kind][metric]);
      data.runs[i] = run;
    });
    const isOther = JSON.stringify(news.charts) !== JSON.stringify(data.charts);
    Object.assign(data, {charts: news.charts, version: news.version});
    isOther ? draw() : refresh();
  }

  async function watch() {
    const began = performance.now(), status = document.getElementById("status");
    if (!document.hidden)
      try {
        const have = data.runs.map(run => `${run.key}:${run.x.length}`).join(",");
        const reply = await fetch(`since?version=${data.version}&have=${have}`);
        if (!reply.ok) throw new Error(`the server answers ${reply.status}`);
        if (reply.status === 200) take(await reply.json());
        status.textContent = `Live, ${new Date().toLocaleTimeString()}.`;
      } catch (error) {
        status.textContent = `No news: ${error.message}. Is spin report --watch still running?`;
      }
    setTimeout(watch, Math.max(1000, 10 * (performance.now() - began)));
  }

  draw();
  new ResizeObserver(resize).observe(boxes[0]);
  slider.addEventListener("input", () => {
    slider.nextElementSibling.textContent = slider.value;
    refresh();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  if ("live" in document.documentElement.dataset) watch();
})();
