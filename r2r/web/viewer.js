// Before and after at full resolution: a slider cuts the part of the view in which "before" is shown; the view zooms and
// is moved with the mouse, with fingers, or as it scrolls with the keyboard. `element` is the component's; its content
// may be exchanged at any time, so that all listeners are the element's own.

const LARGEST = 8; // screen pixels for a pixel of the photo
let drag = null;
let zoom = null; // null: as much as fits

const part = (name) => element.querySelector("." + name);

function fitting() {
  const stage = part("stage"), pair = part("pair");
  return Math.min(stage.clientWidth / pair.dataset.width, stage.clientHeight / pair.dataset.height);
}

function draw() {
  const stage = part("stage"), pair = part("pair");
  if (!stage) return;
  const scale = zoom ?? fitting();
  const width = scale * pair.dataset.width, height = scale * pair.dataset.height;
  pair.style.width = width + "px";
  pair.style.height = height + "px";
  stage.classList.toggle("larger", width > stage.clientWidth + 1 || height > stage.clientHeight + 1);
  const seen = Math.min(width, stage.clientWidth);
  const cut = Math.min(width, stage.scrollLeft + (seen * part("cut").value) / 100);
  part("before").style.clipPath = `inset(0 ${width - cut}px 0 0)`;
  part("line").style.left = cut + "px";
  part("scale").textContent = Math.round(100 * scale * devicePixelRatio) + " %";
}

function setZoom(value, x, y) {
  const stage = part("stage"), pair = part("pair");
  const old = zoom ?? fitting();
  const smallest = Math.min(fitting(), 1 / devicePixelRatio);
  zoom = value === null ? null : Math.min(Math.max(value, smallest), LARGEST);
  const now = zoom ?? fitting();
  x ??= stage.clientWidth / 2;
  y ??= stage.clientHeight / 2;
  const left = Math.max(0, stage.clientWidth - old * pair.dataset.width) / 2; // a narrow photo lies in the middle
  const across = (stage.scrollLeft + x - left) / old, down = (stage.scrollTop + y) / old;
  draw();
  stage.scrollTo(across * now - x, down * now - y);
  draw();
}

const scale = () => zoom ?? fitting();
const actions = {
  fit: () => setZoom(null),
  actual: () => setZoom(1 / devicePixelRatio),
  larger: () => setZoom(scale() * 1.5),
  smaller: () => setZoom(scale() / 1.5),
};

element.addEventListener("click", (event) => actions[event.target.closest("button")?.dataset.action]?.());
element.addEventListener("input", draw);
element.addEventListener("scroll", draw, true);
element.addEventListener("keydown", (event) => {
  if (!event.target.classList.contains("stage") || event.ctrlKey || event.metaKey) return;
  const action = { "+": "larger", "=": "larger", "-": "smaller", 0: "fit", 1: "actual" }[event.key];
  if (action) {
    event.preventDefault();
    actions[action]();
  }
});
element.addEventListener("wheel", (event) => {
  if (!event.ctrlKey || !event.target.closest(".stage")) return; // a pinch on a touchpad arrives as this too
  event.preventDefault();
  const box = part("stage").getBoundingClientRect();
  setZoom(scale() * Math.exp(-event.deltaY / 200), event.clientX - box.left, event.clientY - box.top);
}, { passive: false });

element.addEventListener("pointerdown", (event) => {
  const stage = event.target.closest(".stage");
  if (!stage || event.button) return;
  const line = part("line").getBoundingClientRect();
  const moves = stage.classList.contains("larger") && Math.abs(event.clientX - line.left) > 24;
  drag = { moves, x: event.clientX, y: event.clientY };
  stage.setPointerCapture(event.pointerId);
  if (!moves) cutAt(event.clientX);
});
element.addEventListener("pointermove", (event) => {
  if (!drag) return;
  if (drag.moves) {
    part("stage").scrollBy(drag.x - event.clientX, drag.y - event.clientY);
    drag = { moves: true, x: event.clientX, y: event.clientY };
  } else cutAt(event.clientX);
});
for (const end of ["pointerup", "pointercancel"]) element.addEventListener(end, () => { drag = null; });

function cutAt(x) {
  const stage = part("stage").getBoundingClientRect(), pair = part("pair").getBoundingClientRect();
  const left = Math.max(stage.left, pair.left), right = Math.min(stage.right, pair.right);
  part("cut").value = (100 * (x - left)) / (right - left);
  draw();
}

new ResizeObserver(draw).observe(element);
new MutationObserver(() => { // another photo
  const pair = part("pair");
  if (pair && pair.dataset.seen === undefined) {
    pair.dataset.seen = "";
    zoom = null;
    draw();
  }
}).observe(element, { childList: true, subtree: true });
draw();
