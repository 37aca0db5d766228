"""An exported E4SRec is a language model of transformers alone, whose item tokens have the run's scores."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import export, train
from launch.item_tokens import item_token
from launch.loading import histories_as_split, load_run
from tests.conftest import forget_accelerator

FLAGS = (
    "--model e4srec --data.source sample --data.sample_users 60 --data.sample_series 40 --train.trackers [] "
    "--train.precision fp32 --train.max_steps 2 --train.lr 0.01 --backbone.tiny.hidden_size 32 --backbone.tiny.layers 2"
).split()
TEXT = "Films, in order:"


def e4srec(folder: Path, *flags: str) -> Path:
    forget_accelerator()
    assert train.main([*FLAGS, f"--method.prompts.instruction={TEXT}", *flags, f"--output={folder}"]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "around"),
    [
        (["--method.prompts.titles=false"], TEXT + "{items}"),
        (["--method.prompts.mode=prefix", "--method.prompts.response=\nNext:"], TEXT + "{items}\nNext:"),
        (["--method.output.tied=false", "--method.output.source=random"], TEXT + "{items}"),
        (["--backbone.name={root}/stories260k", "--method.prompts.bos=true"], TEXT + "{items}"),
    ],
    ids=["positions", "prefix", "untied", "LoRA"],
)
def test_item_tokens_have_the_scores_of_the_run(tmp_path: Path, request, flags: list[str], around: str) -> None:
    if "{root}" in flags[0]:
        flags[0] = flags[0].format(root=request.getfixturevalue("backbone_root"))
    path = e4srec(tmp_path / "run", *flags)
    assert export.main([f"--run={path}", f"--to={tmp_path / 'to'}", "--item_tokens=true"]) == 0
    run = load_run(path)
    history = torch.tensor([3, 17, 9, 30])
    examples = run.built.require_full_ranking()(histories_as_split([history.numpy()], run.catalog), "test")
    with torch.no_grad():
        wanted = run.built.model(examples.collate([0]))[0, 1:]

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "to")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "to").eval()
    items = [item_token(raw_id) for raw_id in run.catalog.raw_ids[1:]]
    prompt = around.format(items="".join(items[item - 1] for item in history))
    encoded = tokenizer(prompt, add_special_tokens=run.config.method.prompts.bos, return_tensors="pt")
    with torch.no_grad():
        logits = model(**encoded).logits[0, -1]
    found = logits[tokenizer.convert_tokens_to_ids(items)]
    # A projector's bias adds the same to all items, which no softmax and no rank sees.
    torch.testing.assert_close(found - found.mean(), wanted - wanted.mean(), atol=1e-4, rtol=1e-3)
    assert wanted.std() > 1e-2, "all scores are alike"


@pytest.mark.slow
def test_what_no_head_can_say_is_refused(tmp_path: Path) -> None:
    for name, flag, message in (
        ("cosine", "--method.output.match=cosine", r"--method\.output\.match cosine"),
        ("mapped", "--method.output.projects_state=true", r"--method\.output\.projects_state true"),
        ("both ways", "--backbone.causal=false", r"this run has --backbone\.causal false"),
    ):
        run = e4srec(tmp_path / name, flag)
        with pytest.raises(SystemExit, match=message):
            export.main([f"--run={run}", f"--to={tmp_path / 'to'}", "--item_tokens=true"])
    assert not (tmp_path / "to").exists()


def test_another_method_is_refused_by_name(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="a model of sasrec holds 0 backbones"):
        export.main([f"--run={trained}", f"--to={tmp_path / 'to'}", "--item_tokens=true"])
