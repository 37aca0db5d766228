"""Histories as text, one frozen template a method and domain, and the way back from a text to a title."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .interactions import Catalog


@dataclass(frozen=True)
class Template:
    """Texts around a history: `before` + quoted titles joined by `separator` + `after`, then the response.

    `alone` is the whole prompt when there is no history. `after` and `alone` end with a newline: a response,
    or the first title of the dense mode, stands at the start of a line.
    """

    name: str
    before: str
    after: str
    alone: str
    quote: str = '"'
    separator: str = ", "

    def prompt(self, history_titles: Sequence[str]) -> str:
        """Everything that the model reads before it answers; titles oldest first, as they are."""
        if not history_titles:
            return self.alone
        return self.before + self.separator.join(map(self.response, history_titles)) + self.after

    def response(self, title: str) -> str:
        """The answer that names `title`, without an end token."""
        return f"{self.quote}{title}{self.quote}"


def _alpaca(name: str, instruction: str, heading: str, after_titles: str, quote: str = '"') -> Template:
    """The Alpaca form (tatsu-lab/stanford_alpaca), with an empty-input form for users without a history."""
    task = "Below is an instruction that describes a task"
    request = "Write a response that appropriately completes the request."
    return Template(
        name=name,
        before=f"{task}, paired with an input that provides further context. {request} \n\n"
        f"### Instruction:\n{instruction}\n\n### Input:\n{heading}",
        after=f"{after_titles}\n\n### Response:\n",
        # Two blanks after "request.", as published for training and inference alike.
        alone=f"{task}. {request}  \n\n### Instruction:\n{instruction}\n\n### Response:\n",
        quote=quote,
    )


# The training text of BIGRec (arXiv 2308.08434, SAI990323/BIGRec): a line of one blank follows the titles.
BIGREC_MOVIE = _alpaca(
    "bigrec-movie",
    instruction="Given a list of movies the user has watched before, "
    "please recommend a new movie that the user likes to the user.",
    heading="The user has watched the following movies before:",
    after_titles="\n ",
)
BIGREC_GAME = _alpaca(
    "bigrec-game",
    instruction="Given a list of video games the user has played before, "
    "please recommend a new video game that the user likes to the user.",
    heading="The user has played the following video games before:",
    after_titles="\n ",
)
# The short form: works for any catalogue, and leaves more of the context to titles.
BIGREC_NOTES = _alpaca(
    "bigrec-notes", instruction="Recommend the next item for the user.", heading="", after_titles="", quote=""
)
# For the dense mode, where the titles of a user follow each other and each answers to those before it.
DENSE = Template(
    "dense",
    before="The choices of one user, oldest first:\n",
    after="\n",
    alone="The choices of one user, oldest first:\n",
    quote="",
    separator="\n",
)

TEMPLATES = {template.name: template for template in (BIGREC_MOVIE, BIGREC_GAME, BIGREC_NOTES, DENSE)}


def template_by_name(name: str) -> Template:
    """Look a template up in `TEMPLATES`; raises ValueError that lists the known names."""
    if name not in TEMPLATES:
        raise ValueError(f"--method.prompts.template {name!r}: expected one of {sorted(TEMPLATES)}.")
    return TEMPLATES[name]


def published_inference_spacing(template: Template) -> Template:
    """The form of BIGRec's inference script: two blanks after the first line, one in its training text.

    Only for exact comparison; training and inference use one form here.
    """
    return replace(template, before=template.before.replace("the request. \n", "the request.  \n", 1))


def title_texts(catalog: Catalog) -> list[str]:
    """Titles as the prompts show them, [N + 1]: as they are, blank ones replaced by the raw id."""
    titled = zip(catalog.titles[1:], catalog.raw_ids[1:], strict=True)
    return ["", *(title if title.strip() else raw_id for title, raw_id in titled)]


def prediction(decoded: str) -> str:
    """The answer inside a whole decoded text: what follows the last "Response:" line, or all of it."""
    return decoded.rpartition("Response:\n")[2]


def grounding_text(decoded: str) -> str:
    """The text that is embedded to be compared with the catalogue: the answer without its quotes."""
    return prediction(decoded).strip('"')


TitleRule = Literal["quotes", "quotes-then-blanks", "blanks-then-quotes"]


def clean_title(title: str, rule: TitleRule = "quotes-then-blanks") -> str:
    """A catalogue title as it is embedded and compared: quotes and blanks taken off both ends.

    The published scripts differ: "quotes" (movies), "quotes-then-blanks" (games), "blanks-then-quotes" (the
    notebook that embeds the catalogue).
    """
    if rule == "blanks-then-quotes":
        return title.strip().strip('"')
    without_quotes = title.strip('"')
    return without_quotes if rule == "quotes" else without_quotes.strip()
