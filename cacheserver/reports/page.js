"use strict";

// The charts: each figure names the element that holds its Vega-Lite. `ast` has expressions interpreted rather than
// compiled, which the page's Content-Security-Policy forbids.
const options = {
  actions: false,
  renderer: "svg",
  ast: true,
  config: { background: "transparent", view: { stroke: null }, axis: { titleFontWeight: "normal" } },
};

async function drawCharts() {
  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    const spec = JSON.parse(document.getElementById(figure.dataset.chart).textContent);
    await window.vegaEmbed(figure.querySelector(".drawing"), spec, options);
  }
  document.documentElement.dataset.drawn = "all";
}

// The calculator: a month's pictures, by quality, at its price, less what the cache spares.
const dollars = new Intl.NumberFormat("en-US", { style: "currency", currency: "USD" });

function numberIn(input, most) {
  const value = Number(input.value);
  return Number.isFinite(value) ? Math.min(Math.max(value, 0), most) : 0;
}

function setUpCalculator(calculator) {
  const volume = calculator.querySelector("[name=volume]");
  const spared = calculator.querySelector("[name=spared]");
  const rows = [...calculator.querySelectorAll("tr[data-quality]")].map((row) => ({
    share: row.querySelector("[name=share]"),
    price: row.querySelector("[name=price]"),
    spared: row.querySelector("[name=spared-here]"),
    cost: row.querySelector("output"),
  }));

  function calculate() {
    const shares = rows.map((row) => numberIn(row.share, 1e6));
    const all = shares.reduce((sum, share) => sum + share, 0);
    let without = 0;
    let withCache = 0;
    rows.forEach((row, index) => {
      const pictures = all ? (numberIn(volume, 1e12) * shares[index]) / all : 0;
      const cost = pictures * numberIn(row.price, 1e4);
      const paid = cost * (1 - numberIn(row.spared, 100) / 100);
      row.cost.textContent = dollars.format(paid);
      without += cost;
      withCache += paid;
    });
    calculator.querySelector("[data-out=without]").textContent = dollars.format(without);
    calculator.querySelector("[data-out=with]").textContent = dollars.format(withCache);
    calculator.querySelector("[data-out=saved]").textContent = dollars.format(without - withCache);
    const rate = without ? 100 * (1 - withCache / without) : 0;
    calculator.querySelector("[data-out=rate]").textContent = `${rate.toFixed(1)} %`;
    return rate;
  }

  spared.addEventListener("input", () => {
    for (const row of rows) row.spared.value = spared.value;
    calculate();
  });
  calculator.addEventListener("input", (event) => {
    if (event.target !== spared) spared.value = calculate();
  });
  calculator.addEventListener("reset", () => setTimeout(() => (spared.value = calculate())));
  spared.value = calculate();
}

for (const calculator of document.querySelectorAll("form.calculator")) setUpCalculator(calculator);
drawCharts();
