"""Chat with the models of an experiment in the browser, in the format of the data that they were trained on.

The page lists the experiment's checkpoints and what it started from; give several experiments to compare them. The
conversation stays when another model is chosen, and "retry" under an answer asks that model instead.

    python demos/chat.py --experiment_dir experiments/runs/ppo experiments/runs/dpo
    python demos/chat.py --experiment_dir=HuggingFaceTB/SmolLM2-135M-Instruct --device=cuda
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

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
from serving import LoadedModel, Models, ServingFlags, check_models, default_format, reply

from rlhf.data.formats import format_of, render_prompt
from rlhf.errors import UserError
from rlhf.flags import launch

Turn = dict[str, str]
"""`{"role": "user" | "assistant", "content": text}`."""


@dataclass(kw_only=True)
class ChatFlags(ServingFlags):
    """Chat."""

    format: Literal["auto", "dialogue", "chat_template", "plain"] = "auto"
    """How prompts are written. auto: as in the experiment's data; where nothing is recorded, the tokenizer's chat
    template, or Human/Assistant turns if it has none."""
    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.95


def chat_format(flags: ChatFlags, checkpoint: Checkpoint, loaded: LoadedModel) -> Mapping[str, Any]:
    """How to write this checkpoint's prompts."""
    if flags.format != "auto":
        return format_of(flags.format, loaded.tokenizer)
    return checkpoint.format or default_format(loaded.tokenizer)


def refuse_summaries(flags: ChatFlags, checkpoints: list[Checkpoint]) -> None:
    """Raise `UserError` for models of summaries, unless `--format` says how to talk to them."""
    for checkpoint in checkpoints:
        if flags.format == "auto" and checkpoint.format and checkpoint.format["kind"] == "summary":
            raise UserError(
                f"{checkpoint.label} was trained on posts and summaries; use demos/summarize.py, or say how to talk "
                f"to it with --format=dialogue"
            )


def idle(**update: str) -> Any:
    """The box for messages while nothing is computed."""
    return gr.Textbox(submit_btn="Send", stop_btn=False, **update)


def busy(**update: str) -> Any:
    """The box for messages while an answer is computed."""
    return gr.Textbox(submit_btn=False, stop_btn="Stop", **update)


def bubbles(turns: list[Turn]) -> list[dict[str, Any]]:
    """Turns as the chat shows them: the text as it is, unindented and unparsed."""
    return [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


def build(flags: ChatFlags) -> Any:
    """The page, as `gradio.Blocks`.

    Raises:
        UserError: gradio is missing, a flag can't be used, or a source holds no model to chat with.
    """
    check_gradio()
    checkpoints = find_checkpoints(flags.experiment_dir)
    refuse_summaries(flags, checkpoints)
    check_models(flags)
    by_label = {checkpoint.label: checkpoint for checkpoint in checkpoints}
    models = Models(flags)
    running = Running()

    def answer(turns: list[Turn], label: str, *controls: float, session: str) -> Iterator[dict[Any, Any]]:
        """Stream the answer to `turns`, which end with the user's."""
        checkpoint, stop = by_label[label], running.start(session)
        try:
            sampling = sampling_of(*controls)
            doing = "answering" if models.has(checkpoint) else "loading the model"
            yield {chat: bubbles(turns), message: busy(), line: status(f"{label}: {doing} …")}
            loaded = models.get(checkpoint)
            format = chat_format(flags, checkpoint, loaded)
            prompt = render_prompt(format, turns, loaded.tokenizer)
            yield {prompt_view: prompt, line: status(f"{label}: answering …")}
            began = time.perf_counter()
            for so_far in reply(loaded, prompt, sampling, stop, format.get("stop", ())):
                spoken = [*turns, {"role": "assistant", "content": so_far.text}]
                if so_far.text:
                    yield {chat: bubbles(spoken), history: spoken}
            said = status(account(label, so_far, time.perf_counter() - began, sampling, format))
            yield {message: idle(), line: said} if so_far.text else {**give_back(turns), line: said}
        except Exception as error:
            yield {**give_back(turns), line: failure(error)}
        finally:
            stop.set()

    def give_back(turns: list[Turn]) -> dict[Any, Any]:
        """No answer came: the user's last message goes back into the box, to be sent again or changed."""
        kept = turns[:-1]
        return {chat: bubbles(kept), history: kept, message: idle(value=turns[-1]["content"])}

    def send(text: str, turns: list[Turn], label: str, request: gr.Request, *controls: float):
        if not text.strip():
            yield {line: status("Write a message first.")}
            return
        turns = [*turns, {"role": "user", "content": text.strip()}]
        yield {message: busy(value="")}
        yield from answer(turns, label, *controls, session=request.session_hash)

    def retry(turns: list[Turn], label: str, data: gr.RetryData, request: gr.Request, *controls: float):
        yield from answer(turns[: data.index + 1], label, *controls, session=request.session_hash)

    def undo(turns: list[Turn], data: gr.UndoData):
        kept = turns[: data.index]
        return {chat: bubbles(kept), history: kept, message: turns[data.index]["content"], line: status("")}

    def clear(request: gr.Request):
        running.stop(request)
        return {chat: [], history: [], message: idle(value=""), prompt_view: "", line: status("")}

    with gr.Blocks(title="Chat", analytics_enabled=False, fill_height=True) as blocks:
        history = gr.State([])
        heading("Chat", "Talk to a checkpoint in the format of the data that it was trained on.")
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=340):
                model = gr.Dropdown(list(by_label), value=checkpoints[0].label, label="Model", filterable=False)
                chat = gr.Chatbot(
                    show_label=False,
                    height="56vh",
                    buttons=["copy"],
                    render_markdown=False,
                    latex_delimiters=[],
                    group_consecutive_messages=False,
                    placeholder="No message yet",
                    elem_id="chat",
                )
                line = status_line()
                message = gr.Textbox(
                    show_label=False,
                    label="Message",
                    placeholder="Write a message; Enter sends it",
                    lines=1,
                    max_lines=8,
                    submit_btn="Send",
                    autofocus=True,
                    elem_id="message",
                )
            with gr.Column(scale=1, min_width=260):
                controls = sampling_controls(flags, longest=1024)
                cleared = gr.Button("Clear the conversation", size="md")
                with gr.Accordion("Prompt as the model reads it", open=False):
                    prompt_view = gr.Textbox(
                        show_label=False, container=False, lines=4, max_lines=20, interactive=False
                    )
        shown = [chat, history, message, prompt_view, line]
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        sending = message.submit(send, [message, history, model, *controls], shown, **quiet)
        retrying = chat.retry(retry, [history, model, *controls], shown, **quiet)
        chat.undo(undo, history, shown, **quiet)
        message.stop(running.stop, queue=False, **quiet)
        for clearing in (cleared.click, chat.clear):
            clearing(clear, None, shown, cancels=[sending, retrying], **quiet)
        blocks.unload(running.forget)
    return blocks


def main(flags: ChatFlags) -> None:
    """Serve the page until it is interrupted."""
    serve(build(flags), flags, "chat")


if __name__ == "__main__":
    launch(main, ChatFlags)
