"""Summaries in the browser: a post goes in, and the models of an experiment write its TL;DR.

The prompt is that of the summarisation data (data_prep/summarization), whatever the experiment was trained on. Several
experiments can be given, to compare them on the same post.

    python demos/summarize.py --experiment_dir experiments/runs/sft_tldr experiments/runs/ppo_tldr
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from checkpoints import Checkpoint, find_checkpoints
from page import (
    Running,
    account,
    check_gradio,
    failure,
    gr,
    heading,
    sampling_controls,
    sampling_of,
    serve,
    status,
    status_line,
)
from serving import LoadedModel, Models, ServingFlags, check_models, reply

from rlhf.data.formats import format_of, render_prompt
from rlhf.flags import launch

EXAMPLES = [
    [
        "relationships",
        "My flatmate keeps using my bike without asking",
        "We have shared a flat for a year and get on well. In spring I bought a good second-hand bike, which I "
        "need for work. Since then I have found the saddle lowered three times, and last Monday the bike was gone "
        "when I had to leave, so I took a taxi. He came back at noon, said he thought I worked from home on "
        "Mondays, and laughed it off. I don't mind lending it, but I want to be asked first. I am bad at conflict "
        "and afraid that a lock would look hostile. How do I bring it up without spoiling the mood at home?",
    ],
    [
        "personalfinance",
        "Pay off the car or keep the savings?",
        "I am 27 and have 9,000 in savings and a car loan of 6,500 at 7 percent with three years to go. My job is "
        "safe, my rent is low and I put away about 500 a month. My father says never to touch savings; my sister "
        "says that the loan costs more than the savings earn, so I should pay it off at once. If I did, 2,500 "
        "would be left, which is about two months of expenses. I could fill it up again within a year.",
    ],
]
"""Subreddit, title and post; written for this page."""


@dataclass(kw_only=True)
class SummarizeFlags(ServingFlags):
    """Summaries."""

    port: int = 7861
    max_new_tokens: int = 64
    temperature: float = 0.3
    top_p: float = 0.95


def summary_format(checkpoint: Checkpoint, loaded: LoadedModel) -> Mapping[str, Any]:
    """The data's own TL;DR prompt, or that of data_prep/summarization."""
    recorded = checkpoint.format
    return recorded if recorded and recorded["kind"] == "summary" else format_of("summary", loaded.tokenizer)


def summary_prompt(format: Mapping[str, Any], post: str, title: str, subreddit: str) -> str:
    """The prompt for a post; the lines of a title or subreddit that is not given are left out."""
    filled = {"title": title.strip(), "subreddit": subreddit.strip().removeprefix("r/")}
    kept = [
        line
        for line in format["template"].splitlines(keepends=True)
        if not any("{" + name + "}" in line and not value for name, value in filled.items())
    ]
    message = {"role": "user", "content": post.strip()}
    return render_prompt({**format, "template": "".join(kept)}, [message], **filled)


def build(flags: SummarizeFlags) -> Any:
    """The page, as `gradio.Blocks`.

    Raises:
        UserError: gradio is missing, a flag can't be used, or a source holds no language model.
    """
    check_gradio()
    checkpoints = find_checkpoints(flags.experiment_dir)
    check_models(flags)
    by_label = {checkpoint.label: checkpoint for checkpoint in checkpoints}
    models = Models(flags)
    running = Running()

    def buttons(*, busy: bool) -> dict[Any, Any]:
        return {start: gr.Button(visible=not busy), stop_button: gr.Button(visible=busy)}

    def summarize(
        subreddit: str, title: str, post: str, label: str, request: gr.Request, *controls: float
    ) -> Iterator[dict[Any, Any]]:
        """Stream the summary of one post."""
        if not post.strip():
            yield {line: status("Paste a post first.")}
            return
        checkpoint, stop = by_label[label], running.start(request.session_hash)
        try:
            sampling = sampling_of(*controls)
            doing = "writing" if models.has(checkpoint) else "loading the model"
            yield {summary: "", line: status(f"{label}: {doing} …"), **buttons(busy=True)}
            loaded = models.get(checkpoint)
            format = summary_format(checkpoint, loaded)
            prompt = summary_prompt(format, post, title, subreddit)
            yield {prompt_view: prompt, line: status(f"{label}: writing …")}
            began = time.perf_counter()
            for so_far in reply(loaded, prompt, sampling, stop, format.get("stop", ())):
                yield {summary: so_far.text}
            said = account(label, so_far, time.perf_counter() - began, sampling, format)
            yield {line: status(said), **buttons(busy=False)}
        except Exception as error:
            yield {line: failure(error), **buttons(busy=False)}
        finally:
            stop.set()

    def clear(request: gr.Request):
        running.stop(request)
        empty = dict.fromkeys((subreddit, title, post, summary, prompt_view), "")
        return {**empty, line: status(""), **buttons(busy=False)}

    with gr.Blocks(title="Summaries", analytics_enabled=False) as blocks:
        heading("Summaries", "Paste a post; the model writes its TL;DR.")
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=340):
                model = gr.Dropdown(list(by_label), value=checkpoints[0].label, label="Model", filterable=False)
                with gr.Row():
                    subreddit = gr.Textbox(label="Subreddit (optional)", placeholder="relationships", min_width=150)
                    title = gr.Textbox(label="Title (optional)", scale=2, max_lines=3, min_width=300)
                post = gr.Textbox(label="Post", lines=9, max_lines=18, elem_id="post")
                with gr.Row():
                    start = gr.Button("Summarise", variant="primary", min_width=120)
                    stop_button = gr.Button("Stop", variant="stop", visible=False, min_width=120)
                    cleared = gr.Button("Clear", min_width=120)
                summary = gr.Textbox(
                    label="TL;DR", lines=5, max_lines=12, interactive=False, buttons=["copy"], elem_id="summary"
                )
                line = status_line()
                gr.Examples(EXAMPLES, [subreddit, title, post], example_labels=[row[1] for row in EXAMPLES])
            with gr.Column(scale=1, min_width=260):
                controls = sampling_controls(flags, longest=512)
                with gr.Accordion("Prompt as the model reads it", open=False):
                    prompt_view = gr.Textbox(
                        show_label=False, container=False, lines=4, max_lines=20, interactive=False
                    )
        shown = [subreddit, title, post, summary, prompt_view, line, start, stop_button]
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        writing = start.click(summarize, [subreddit, title, post, model, *controls], shown, **quiet)
        stop_button.click(running.stop, queue=False, **quiet)
        cleared.click(clear, None, shown, cancels=[writing], **quiet)
        blocks.unload(running.forget)
    return blocks


def main(flags: SummarizeFlags) -> None:
    """Serve the page until it is interrupted."""
    serve(build(flags), flags, "summarize")


if __name__ == "__main__":
    launch(main, SummarizeFlags)
