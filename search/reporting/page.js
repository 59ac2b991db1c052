// Hover, keyboard and files of the report. Marks are known by the gid of their group; texts come from the page itself.
"use strict";
(() => {
  const texts = JSON.parse(document.getElementById("tips").textContent);
  const tip = document.getElementById("tip");
  const live = document.getElementById("live");
  const REACH = 14; // CSS pixels around the pointer in which a mark is found

  function marksOf(plot) {
    const marks = [];
    for (const [gid, tips] of texts[plot.dataset.name] || []) {
      const group = document.getElementById(plot.dataset.name + "--" + gid);
      if (!group) continue;
      const uses = group.querySelectorAll("use");
      const found = uses.length ? uses : group.querySelectorAll("path");
      for (let i = 0; i < tips.length && i < found.length; i++) marks.push({ element: found[i], text: tips[i] });
    }
    return marks;
  }

  // Places of marks relative to the plot, measured once for each size of it.
  function places(plot, state) {
    const box = plot.getBoundingClientRect();
    if (state.width !== box.width) {
      state.width = box.width;
      for (const mark of state.marks) {
        const r = mark.element.getBoundingClientRect();
        mark.x = r.left - box.left; mark.y = r.top - box.top; mark.w = r.width; mark.h = r.height;
      }
    }
    return box;
  }

  // What the tip speaks of now, and whether the keyboard chose it.
  let shown = null;

  function show(plot, state, index, byKeyboard) {
    shown = { plot, state, index, byKeyboard };
    const box = places(plot, state);
    const mark = state.marks[index];
    state.index = index;
    const ring = state.ring, pad = mark.w > 30 ? 1 : 4;
    ring.style.cssText = `display:block;left:${mark.x - pad}px;top:${mark.y - pad}px;width:${mark.w + 2 * pad}px;` +
      `height:${mark.h + 2 * pad}px;border-radius:${mark.w > 30 || mark.h > 30 ? 3 : 50}${mark.w > 30 || mark.h > 30 ? "px" : "%"}`;
    tip.textContent = mark.text;
    tip.style.display = "block";
    const x = box.left + mark.x + mark.w / 2, y = box.top + mark.y;
    const w = tip.offsetWidth, h = tip.offsetHeight;
    tip.style.left = Math.max(6, Math.min(innerWidth - w - 6, x - w / 2)) + "px";
    const above = y - h - 12;
    tip.style.top = (above > 50 ? above : Math.min(innerHeight - h - 6, y + mark.h + 12)) + "px";
  }

  function hide(state) {
    shown = null;
    tip.style.display = "none";
    state.ring.style.display = "none";
  }

  function nearest(plot, state, event) {
    const box = places(plot, state);
    const px = event.clientX - box.left, py = event.clientY - box.top;
    let best = -1, distance = REACH;
    state.marks.forEach((mark, index) => {
      const dx = Math.max(mark.x - px, 0, px - mark.x - mark.w), dy = Math.max(mark.y - py, 0, py - mark.y - mark.h);
      const far = Math.hypot(dx, dy) + Math.hypot(mark.x + mark.w / 2 - px, mark.y + mark.h / 2 - py) * 1e-3;
      if (far < distance) { distance = far; best = index; }
    });
    return best;
  }

  for (const plot of document.querySelectorAll(".plot")) {
    const state = { marks: null, index: -1, width: 0, ring: plot.appendChild(document.createElement("div")) };
    state.ring.className = "ring";
    const ready = () => { if (!state.marks) state.marks = marksOf(plot); return state.marks.length > 0; };
    const point = (event) => {
      if (!ready()) return;
      const index = nearest(plot, state, event);
      if (index < 0) hide(state); else show(plot, state, index, false);
    };
    plot.addEventListener("pointermove", point);
    plot.addEventListener("pointerdown", point);
    plot.addEventListener("pointerleave", () => hide(state));
    plot.addEventListener("blur", () => hide(state));
    plot.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { hide(state); return; }
      if (!ready()) return;
      const last = state.marks.length - 1;
      const next = { ArrowRight: state.index + 1, ArrowDown: state.index + 1, ArrowLeft: state.index - 1,
        ArrowUp: state.index - 1, Home: 0, End: last, PageDown: state.index + 10, PageUp: state.index - 10 }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      show(plot, state, Math.max(0, Math.min(last, next)), true);
      live.textContent = state.marks[state.index].text;
    });
  }
  // Focus scrolls a picture into view, so the keyboard's mark is followed; the pointer's has moved away from it.
  addEventListener("scroll", () => {
    if (!shown) return;
    if (shown.byKeyboard) show(shown.plot, shown.state, shown.index, true); else hide(shown.state);
  }, { passive: true });

  function save(name, kind, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: kind }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.svg) {
      const style = getComputedStyle(document.documentElement);
      const text = document.querySelector(`.plot[data-name="${button.dataset.svg}"] svg`).outerHTML
        .replace(/var\(--([a-z0-9-]+)\)/g, (_, name) => style.getPropertyValue("--" + name))
        .replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" ');
      save(button.dataset.svg + ".svg", "image/svg+xml", text);
    } else if (button.dataset.csv) {
      save(button.dataset.csv + ".csv", "text/csv", document.getElementById("csv-" + button.dataset.csv).textContent.trim() + "\n");
    } else if (button.id === "theme") {
      const dark = matchMedia("(prefers-color-scheme: dark)").matches;
      const now = document.documentElement.dataset.theme || (dark ? "dark" : "light");
      setTheme(now === "dark" ? "light" : "dark");
    } else if (button.id === "refresh") {
      clearInterval(timer);
      button.textContent = "Refreshing is off";
      button.disabled = true;
    }
  });

  function setTheme(name) {
    document.documentElement.dataset.theme = name;
    try { sessionStorage.setItem("theme", name); } catch (error) { /* no storage from file:// in some browsers */ }
  }
  try { const kept = sessionStorage.getItem("theme"); if (kept) setTheme(kept); } catch (error) { /* as above */ }

  const seconds = Number(document.body.dataset.refresh);
  const timer = seconds ? setInterval(() => { if (!document.hidden) location.reload(); }, 1000 * seconds) : 0;
})();
