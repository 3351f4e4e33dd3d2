"use strict";
(() => {
  const { plots, grid } = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const escaped = (text) =>
    String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
  const number = (value) => (value === null ? "–" : value.toFixed(4));

  // The trials of each cell, by arm, initialization and rate.
  const cells = new Map();
  for (const trial of grid ? grid.trials : []) {
    const key = trial.slice(1, 4).join();
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(trial);
  }
  const trialsAt = (arm, init, rate) => cells.get([arm, init, rate].join()) || [];
  const place = (init, rate) =>
    `${grid.init_name} ${grid.inits[init]}, learning rate ${grid.rates[rate]}`;
  const result = ([, , , , seed, accuracy, diverged]) =>
    `seed ${seed}: ${number(accuracy)}${diverged ? ", diverged" : ""}`;

  function hover(arms, init, rate) {
    const lines = [`<b>${escaped(place(init, rate))}</b>`];
    for (const arm of arms) {
      const trials = trialsAt(arm, init, rate);
      lines.push(escaped(grid.arms[arm]) + (trials.length ? "" : ": no trial"));
      for (const trial of trials) {
        lines.push(`  ${escaped(result(trial))} (trial ${trial[0]})`);
      }
    }
    return lines.join("<br>");
  }

  function link([trialNumber, , , , , , , directory]) {
    const name = `trial ${trialNumber}`;
    if (directory === null) return document.createTextNode(name);
    const anchor = document.createElement("a");
    anchor.href = grid.base + (directory === 1 ? trialNumber : directory) + "/";
    anchor.textContent = name;
    return anchor;
  }

  function element(name, ...content) {
    const made = document.createElement(name);
    made.append(...content);
    return made;
  }

  function show(arms, init, rate) {
    const lists = arms.map((arm) => {
      const trials = trialsAt(arm, init, rate);
      const items = trials.map((trial) => element("li", `${result(trial)}, `, link(trial)));
      return [element("div", grid.arms[arm] + (items.length ? "" : ": no trial")), element("ul", ...items)];
    });
    document
      .getElementById("cell")
      .replaceChildren(element("strong", place(init, rate)), ...lists.flat());
  }

  // The tab key selects a heatmap; arrow keys move a frame from cell to cell.
  function followKeys(div, { arms }) {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowDown: [-1, 0], ArrowUp: [1, 0] };
    const at = [0, 0];
    const select = () => {
      show(arms, at[0], at[1]);
      const [y, x] = at;
      const frame = { type: "rect", x0: x - 0.5, x1: x + 0.5, y0: y - 0.5, y1: y + 0.5 };
      Plotly.relayout(div, { shapes: [{ ...frame, line: { color: "#ff00aa", width: 3 } }] });
    };
    div.addEventListener("keydown", (event) => {
      if (!(event.key in moves)) return;
      event.preventDefault();
      const move = moves[event.key];
      at[0] = Math.min(Math.max(at[0] + move[0], 0), grid.inits.length - 1);
      at[1] = Math.min(Math.max(at[1] + move[1], 0), grid.rates.length - 1);
      select();
    });
    div.on("plotly_click", ({ points: [point] }) => {
      [at[0], at[1]] = [Math.round(point.y), Math.round(point.x)];
      select();
    });
  }

  function themed(layout, isDark) {
    const ink = isDark ? "#e4e8ec" : "#1b1f24";
    const line = isDark ? "#3a424b" : "#d0d7de";
    const made = {
      ...layout,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { ...layout.font, color: ink, family: "system-ui, sans-serif" },
      hoverlabel: { align: "left", namelength: -1 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: line, activecolor: ink },
    };
    for (const axis of Object.keys(layout).filter((name) => /^[xy]axis\d*$/.test(name))) {
      // Searching for labels beyond the figure would take a quarter of the time to draw.
      const fixed = { gridcolor: line, zerolinecolor: line, linecolor: line, ticklabeloverflow: "allow" };
      made[axis] = { ...fixed, ...layout[axis] };
    }
    return made;
  }

  // Numbers that are wider than their cells are left out; pointing at a cell shows them.
  function fitTexts(div, [{ text: rows }]) {
    if (!rows) return;
    const longest = Math.max(...rows.flat().map((text) => text.length));
    const cell = div.querySelector(".nsewdrag").getBoundingClientRect().width / rows[0].length;
    const template = cell < 5 * longest + 2 ? "" : "%{text}";
    if (div.data[0].texttemplate !== template) Plotly.restyle(div, { texttemplate: template }, [0]);
  }

  function draw({ id, traces, layout, tools, cells: shown }) {
    const div = document.getElementById(id);
    if (shown) {
      for (const trace of traces.filter((one) => one.type === "heatmap")) {
        trace.hovertext = trace.z.map((row, i) => row.map((_, r) => hover(shown.arms, i, r)));
      }
    }
    const options = {
      responsive: true,
      displaylogo: false,
      displayModeBar: tools ? "hover" : false,
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    };
    return Plotly.newPlot(div, traces, themed(layout, dark.matches), options).then(() => {
      if (!shown) return;
      followKeys(div, shown);
      fitTexts(div, traces);
      div.on("plotly_afterplot", () => fitTexts(div, traces));
    });
  }

  function fillTable() {
    const details = document.getElementById("all-trials");
    if (!details) return;
    const body = details.querySelector("tbody");
    const more = details.querySelector("button");
    let next = 0;
    const add = () => {
      for (const trial of grid.trials.slice(next, next + 200)) {
        const [, arm, init, rate, seed, accuracy, diverged] = trial;
        const texts = [grid.arms[arm], grid.inits[init], grid.rates[rate], seed, number(accuracy)];
        const row = element("tr", element("td", link(trial)));
        row.append(...[...texts, diverged ? "diverged" : ""].map((text) => element("td", String(text))));
        body.append(row);
      }
      next += 200;
      more.hidden = next >= grid.trials.length;
      stackTables();
    };
    more.addEventListener("click", add);
    details.addEventListener("toggle", () => details.open && next === 0 && add());
  }

  // A table that is wider than the page becomes a list of rows, whose cells have their column's name.
  function stackTables() {
    for (const wide of document.querySelectorAll(".wide")) {
      wide.classList.remove("stacked");
      if (wide.scrollWidth <= wide.clientWidth) continue;
      const heads = [...wide.querySelectorAll("thead th")].map((head) => head.textContent);
      for (const row of wide.querySelectorAll("tbody tr")) {
        [...row.children].forEach((cell, i) => (cell.dataset.head = heads[i]));
      }
      wide.classList.add("stacked");
    }
  }

  // In print, figures have the width of a sheet, one below the other.
  function redraw(isDark, width) {
    document.querySelector("main").style.maxWidth = width ? `${width}px` : "";
    stackTables();
    for (const { id, layout } of plots) {
      Plotly.update(id, {}, { ...themed(layout, isDark), width, autosize: width === undefined });
    }
  }

  Promise.all(plots.map(draw)).then(() => {
    fillTable();
    stackTables();
    addEventListener("resize", stackTables);
    dark.addEventListener("change", () => redraw(dark.matches));
    addEventListener("beforeprint", () => redraw(false, 640));
    addEventListener("afterprint", () => redraw(dark.matches));
    document.documentElement.dataset.drawn = Math.round(performance.now());
  });
})();
