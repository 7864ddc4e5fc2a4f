// A scatter plot of weights in [0, ...]; a dragged frame, or one moved by arrow keys, chooses dots.
// dots: {x, y, kind}, kind 0 (right or unknown) or 1 (wrong); chosen is called with the places of the dots in the frame.
function trustMap(canvas, dots, chosen) {
  const top = 1.04 * dots.x.concat(dots.y).reduce((most, value) => Math.max(most, value), 1);
  const room = { left: 42, bottom: 38, top: 6, right: 6 };
  let frame = null; // x0, y0, x1, y1 in weights
  let size = [0, 0]; // of the canvas; to ask for it takes time
  const wide = () => size[0] - room.left - room.right, high = () => size[1] - room.top - room.bottom;
  const across = x => room.left + (x / top) * wide(), up = y => size[1] - room.bottom - (y / top) * high();
  const weight = event => {
    const box = canvas.getBoundingClientRect();
    const x = (event.clientX - box.left - room.left) / wide(), y = (box.bottom - room.bottom - event.clientY) / high();
    return [x, y].map(part => Math.min(1, Math.max(0, part)) * top);
  };

  function draw() {
    const pen = canvas.getContext("2d"), scale = window.devicePixelRatio || 1;
    size = [canvas.clientWidth, canvas.clientHeight];
    [canvas.width, canvas.height] = size.map(side => side * scale);
    pen.scale(scale, scale);
    pen.font = "12px system-ui, sans-serif";
    pen.fillStyle = pen.strokeStyle = color("soft");
    pen.strokeRect(room.left, room.top, wide(), high());
    for (let tick = 0; tick <= top; tick += top > 2.1 ? Math.ceil(top / 5) : 0.5) {
      pen.textAlign = "center";
      pen.fillText(tick, across(tick), size[1] - room.bottom + 15);
      pen.textAlign = "right";
      pen.fillText(tick, room.left - 5, up(tick) + 4);
    }
    pen.textAlign = "center";
    pen.fillText("weight of the label", room.left + wide() / 2, size[1] - 6);
    pen.save();
    pen.translate(12, room.top + high() / 2);
    pen.rotate(-Math.PI / 2);
    pen.fillText("weight of the teacher", 0, 0);
    pen.restore();
    pen.globalAlpha = dots.x.length > 2000 ? 0.35 : 0.6;
    for (const kind of [0, 1]) {
      pen.fillStyle = color(kind ? "wrong" : "right");
      dots.x.forEach((x, place) => {
        if (dots.kind[place] !== kind || x === null) return;
        pen.fillRect(across(x) - 2, up(dots.y[place]) - 2, 4, 4); // circles are slow
      });
    }
    if (!frame) return;
    pen.globalAlpha = 1;
    pen.strokeStyle = color("ink");
    pen.lineWidth = 2;
    pen.strokeRect(across(frame[0]), up(frame[3]), across(frame[2]) - across(frame[0]), up(frame[1]) - up(frame[3]));
  }

  function choose() {
    draw();
    const [x0, y0, x1, y1] = frame;
    const within = place => dots.x[place] >= x0 && dots.x[place] <= x1 && dots.y[place] >= y0 && dots.y[place] <= y1;
    chosen(dots.x.map((_, place) => place).filter(place => dots.x[place] !== null && within(place)));
  }

  let start = null;
  const drag = event => {
    const [x, y] = weight(event);
    frame = [Math.min(x, start[0]), Math.min(y, start[1]), Math.max(x, start[0]), Math.max(y, start[1])];
    draw();
  };
  canvas.onpointerdown = event => {
    start = weight(event);
    canvas.setPointerCapture(event.pointerId);
  };
  canvas.onpointermove = event => start && drag(event);
  canvas.onpointercancel = () => (start = null);
  canvas.onpointerup = event => {
    if (!start) return;
    drag(event);
    start = null;
    choose();
  };
  canvas.onkeydown = event => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowDown: [0, -1], ArrowUp: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    frame ||= [0, 0, top / 4, top / 4];
    const [dx, dy] = move.map(step => (step * top) / 20);
    frame = event.shiftKey
      ? [frame[0], frame[1], Math.max(frame[0], frame[2] + dx), Math.max(frame[1], frame[3] + dy)]
      : [frame[0] + dx, frame[1] + dy, frame[2] + dx, frame[3] + dy];
    choose();
  };
  canvas.observer?.disconnect(); // of the dots that were here before
  canvas.observer = new ResizeObserver(draw);
  canvas.observer.observe(canvas); // which draws
}
