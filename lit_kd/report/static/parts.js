// What all pages share: their data, elements, pictures of rows.
const at = id => document.getElementById(id);
const data = JSON.parse(at("data").textContent);

function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children); // texts stay texts
  return made;
}

// A tile of the sprite sheets.
function picture(tile, aspect) {
  const made = make("span", { className: `tile sheet-${Math.floor(tile / 256)}` });
  made.style.aspectRatio = aspect;
  made.style.backgroundPosition = `${((tile % 16) / 15) * 100}% ${(Math.floor((tile % 256) / 16) / 15) * 100}%`;
  return made;
}

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`);
}

document.addEventListener("keydown", event => {
  const keys = at("keys");
  if (event.key === "?" && keys) keys.open = !keys.open;
});
