"use strict";
(() => {
  // The picture is scrolled by the browser; the script only changes its size.
  document.querySelectorAll("[data-graph]").forEach((graph) => {
    const canvas = graph.querySelector(".canvas");
    const svg = canvas.querySelector("svg");
    const overview = graph.querySelector(".overview");
    const lens = graph.querySelector(".lens");
    const { width, height } = svg.viewBox.baseVal;
    const limits = [0.05, 4];
    let zoom = 1;

    const look = () => {
      const left = canvas.scrollLeft / zoom;
      const top = canvas.scrollTop / zoom;
      lens.setAttribute("x", left);
      lens.setAttribute("y", top);
      lens.setAttribute("width", Math.min(width, canvas.clientWidth / zoom));
      lens.setAttribute("height", Math.min(height, canvas.clientHeight / zoom));
    };
    // The point of the picture under (x, y) of the canvas stays there.
    const scale = (wanted, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) => {
      const next = Math.min(limits[1], Math.max(limits[0], wanted));
      const ratio = next / zoom;
      const left = (canvas.scrollLeft + x) * ratio - x;
      const top = (canvas.scrollTop + y) * ratio - y;
      zoom = next;
      svg.setAttribute("width", width * zoom);
      svg.setAttribute("height", height * zoom);
      canvas.scrollTo({ left, top, behavior: "instant" });
      look();
    };
    const fit = {
      width: () => scale(Math.min(1, canvas.clientWidth / width), 0, 0),
      all: () => scale(Math.min(canvas.clientWidth / width, canvas.clientHeight / height), 0, 0),
    };

    graph.querySelectorAll("[data-zoom]").forEach((button) => {
      button.addEventListener("click", () => scale(zoom * Number(button.dataset.zoom)));
    });
    graph.querySelectorAll("[data-fit]").forEach((button) => {
      button.addEventListener("click", () => fit[button.dataset.fit]());
    });
    const colours = graph.querySelector("[data-colours]");
    if (colours) colours.addEventListener("change", () => { graph.dataset.colour = svg.querySelector(".picture").dataset.colour = colours.value; });

    canvas.addEventListener("scroll", look, { passive: true });
    new ResizeObserver(look).observe(canvas);
    canvas.addEventListener("keydown", (event) => {
      const factor = { "+": 1.25, "=": 1.25, "-": 0.8 }[event.key];
      if (factor && !event.ctrlKey && !event.metaKey) {
        scale(zoom * factor);
        event.preventDefault();
      }
    });
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      const place = canvas.getBoundingClientRect();
      scale(zoom * Math.exp(-event.deltaY / 300), event.clientX - place.left, event.clientY - place.top);
    }, { passive: false });

    // One pointer drags (a mouse; fingers scroll by themselves), two fingers pinch.
    const pointers = new Map();
    const spread = () => {
      const [a, b] = Array.from(pointers.values());
      return { distance: Math.hypot(a.x - b.x, a.y - b.y), x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 };
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "mouse" && event.button !== 0) return;
      pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    });
    window.addEventListener("pointermove", (event) => {
      const before = pointers.get(event.pointerId);
      if (!before) return;
      const now = { x: event.clientX, y: event.clientY };
      if (pointers.size === 2) {
        const old = spread();
        pointers.set(event.pointerId, now);
        const place = canvas.getBoundingClientRect();
        const after = spread();
        if (old.distance) scale(zoom * after.distance / old.distance, after.x - place.left, after.y - place.top);
        return;
      }
      pointers.set(event.pointerId, now);
      if (event.pointerType === "mouse") {
        canvas.scrollBy({ left: before.x - now.x, top: before.y - now.y, behavior: "instant" });
      }
    });
    ["pointerup", "pointercancel"].forEach((name) => {
      window.addEventListener(name, (event) => pointers.delete(event.pointerId));
    });

    const jump = (event) => {
      if (event.type === "pointermove" && !(event.buttons & 1)) return;
      const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(overview.getScreenCTM().inverse());
      canvas.scrollTo({
        left: point.x * zoom - canvas.clientWidth / 2,
        top: point.y * zoom - canvas.clientHeight / 2,
        behavior: "instant",
      });
    };
    overview.addEventListener("pointerdown", jump);
    overview.addEventListener("pointermove", jump);
    // At first: large enough to read, with the first input in the middle.
    scale(Math.max(0.7, Math.min(1, canvas.clientWidth / width)), 0, 0);
    const first = svg.querySelector("[data-first]");
    canvas.scrollTo({ left: Number(first.dataset.first) * zoom - canvas.clientWidth / 2, top: 0, behavior: "instant" });
  });
})();
