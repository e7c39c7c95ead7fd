"""What the demo's model reached, and the page that shows it."""

from __future__ import annotations

import html
from dataclasses import dataclass

from r2r.demo.photos import CROPS, TASKS
from r2r.evaluation import Evaluation

# What the default time on two cores is meant to reach.
IMPROVED, MATCHED = 4, 0.8

HEADINGS = ("task", "degraded", "restored blind", "told the task", "gain blind", "matched")
PICTURES = {
    "contact_sheet": "Held-out photos: degraded, restored blind, clean.",
    "bank": "Keys of the bank and queries of held-out crops, each cloud around its own mean.",
    "losses": "Training: loss, PSNR and matching on the batches.",
}


@dataclass(frozen=True)
class Outcome:
    """Held-out photos restored blind and told, and held-out crops matched."""

    photos: Evaluation
    crops: Evaluation

    @property
    def improved(self) -> int:
        """For how many tasks the photos restored blind are nearer to the clean ones, in PSNR, than the degraded."""
        return sum(one.blind.psnr > one.input.psnr for one in self.photos.sets)

    @property
    def reached(self) -> bool:
        return self.improved >= IMPROVED and self.crops.accuracy >= MATCHED

    def verdict(self) -> str:
        figures = (
            f"improved {self.improved} of {len(TASKS)} tasks, matched {self.crops.accuracy:.0%} of "
            f"{len(TASKS) * CROPS} held-out crops"
        )
        aim = f"at least {IMPROVED} of {len(TASKS)} and {MATCHED:.0%}"
        if self.reached:
            return f"{figures}: the aim of {aim} is reached"
        return f"{figures}: the aim of {aim} is NOT reached; train longer with --minutes, in another --out"

    def rows(self) -> list[tuple[str, ...]]:
        """For each task: its name, PSNR degraded, restored blind, told, the gain blind, and the crops matched."""
        return [
            (
                one.name,
                f"{one.input.psnr:.2f}",
                f"{one.blind.psnr:.2f}",
                f"{one.told.psnr:.2f}" if one.told else "-",
                f"{one.blind.psnr - one.input.psnr:+.2f}",
                f"{crops.accuracy:.0%}",
            )
            for one, crops in zip(self.photos.sets, self.crops.sets, strict=True)
        ]


def page(outcome: Outcome) -> str:
    """The HTML page; pictures lie beside it."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in HEADINGS)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(x)}</td>' for x in row)}</tr>" for row in outcome.rows())
    figures = "".join(
        f'<figure><img src="{name}.png" alt=""><figcaption>{html.escape(caption)}</figcaption></figure>'
        for name, caption in PICTURES.items()
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>R2R: demo</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }}
body {{ max-width: 70rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; margin: 1rem 0 }} th, td {{ padding: .25rem .9rem; text-align: right }}
th:first-child, td:first-child {{ text-align: left }} tr + tr td {{ border-top: 1px solid #8886 }}
figure {{ margin: 2rem 0 }} img {{ max-width: 100%; background: white }} figcaption {{ opacity: .75 }}
.verdict {{ padding: .6rem 1rem; border-left: 4px solid {"#009e73" if outcome.reached else "#e69f00"} }}
</style>
<h1>One model, five degradations, nothing told</h1>
<p>A model of {outcome.photos.parameters / 1e6:.2f} million parameters, trained on this machine on photos that come with
installed packages. What is shown was never trained on. PSNR in dB, on whole photos; the last column counts crops.</p>
<p class="verdict">{html.escape(outcome.verdict())}</p>
<table><tr>{head}</tr>{body}</table>
{figures}
</html>
"""
