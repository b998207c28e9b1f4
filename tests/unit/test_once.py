"""What need not be computed twice: equal rows, equal branches, and what is constant in an edit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from muse_maskgit_pytorch import Muse
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.editing import free, inpaint, outpaint
from muse_maskgit_pytorch.images import to_pil
from muse_maskgit_pytorch.sampling import step
from muse_maskgit_pytorch.text import TextEncoder
from muse_maskgit_pytorch.words import emphasise


@pytest.fixture(scope="module")
def muse(t5: str) -> Any:
    torch.manual_seed(0)
    text = dict(t5_name=t5, text_embed_dim=None)
    base = tiny.maskgit(tiny.transformer(**text), token_critic=tiny.critic(**text))
    return Muse(base, tiny.superres(model=tiny.transformer(seq_len=64, **text))).eval()


@pytest.fixture
def passes(muse: Muse):
    """Rows and branches of every pass of the base."""
    seen: list[tuple[int, int]] = []
    hook = muse.base.transformer.register_forward_pre_hook(
        lambda _, given: seen.append((len(given[0]), given[1].num_branches))
    )
    yield seen
    hook.remove()


def plainly(model: Any, *arguments: Any, **more: Any) -> Tensor:
    """The ids of `sample` by the plain way."""
    model.precision = "reference"
    try:
        return model.sample(*arguments, **more)
    finally:
        model.precision = "float32"


OPTIONS: Any = dict(timesteps=3, cond_scale=4.0, temperature=0.8, guidance_schedule="constant")


@pytest.mark.parametrize("policy", ["confidence", "critic"])
@pytest.mark.parametrize("given", ["nothing", "one canvas", "two canvases", "two scales"])
def test_equal_rows_are_computed_once(muse, passes, given: str, policy: str):
    """In the first step; afterwards, noise has made them different."""
    model = muse.base
    text = model.embed_texts(["a"] * 3 + ["two words"] * 2)
    canvas = torch.full((5, 16), model.transformer.mask_id)
    options = model.default_options.replace(**OPTIONS, seeds=0, policy=policy)
    expected = 2
    if given != "nothing":
        canvas[:, :6] = tiny.ids(num_tokens=6, batch=1)
    if given == "two canvases":
        canvas[1, 0] = (canvas[1, 0] + 1) % 60
        expected = 4  # the first, the second, the third, and the other text
    if given == "two scales":
        options = options.replace(cond_scale=[4.0, 4.0, 1.0, 4.0, 4.0])
        expected = 3
    found = model.sample(text, options, canvas=canvas)
    assert passes == [(expected, 2), (5, 2), (5, 2)]
    assert torch.equal(found, plainly(model, text, options, canvas=canvas))
    assert len(found.unique(dim=0)) == 5


def test_rows_of_other_contexts_are_not_equal(muse, passes):
    model, text = muse.base, muse.base.embed_texts(["a cat"] * 3)
    options = model.default_options.replace(**OPTIONS, seeds=0, policy="confidence")
    negatives = ["a dog", "a dog", "a cat"]
    found = model.sample(text, options, negatives=negatives)
    assert [rows for rows, _ in passes] == [2, 3, 3]
    assert torch.equal(found, plainly(model, text, options, negatives=negatives))
    other, low = muse.superres, tiny.ids(3)
    low[1] = low[0]
    options = other.default_options.replace(**OPTIONS, seeds=0)
    seen: list[int] = []
    with other.transformer.register_forward_pre_hook(lambda _, given: seen.append(len(given[0]))):
        found = other.sample(text, options, cond=low)
    assert seen == [2, 3, 3]
    assert torch.equal(found, plainly(other, text, options, cond=low))


def test_a_batch_of_one_prompt_is_one_text(muse, monkeypatch):
    encoded: list[int] = []
    plain = TextEncoder._compute
    monkeypatch.setattr(
        TextEncoder,
        "_compute",
        lambda self, texts, *a: encoded.append(len(texts)) or plain(self, texts, *a),
    )
    text = muse.base.embed_texts(
        ["one of a kind", "another", "one of a kind", " "], allow_empty=True
    )
    assert encoded == [3]
    assert torch.equal(text.embeds[0], text.embeds[2])
    assert text.mask.any(dim=1).tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    "prompt, negative, branches",
    [
        ("a cat", None, 2),
        ("a cat", "a dog", 2),
        ("a cat", " ", 2),
        ("a cat", "a cat", 1),
        ("", None, 1),
        ("", "", 1),
        ("", "a dog", 2),
    ],
)
def test_equal_branches_are_one(muse, passes, prompt, negative, branches):
    model = muse.base
    text = model.embed_texts([prompt], allow_empty=True)
    options = model.default_options.replace(**OPTIONS, seeds=1, policy="confidence")
    negatives = None if negative is None else [negative]
    found = model.sample(text, options, negatives=negatives)
    assert passes == [(1, branches)] * 3
    assert torch.equal(found, plainly(model, text, options, negatives=negatives))
    passes.clear()
    # a step of one's own may make them different
    model.sample(text, options, negatives=negatives, step=lambda *a, **how: step(*a, **how))
    assert passes == [(1, 2)] * 3


def test_words_are_emphasised_against_the_same_text(muse):
    """Emphasis changes one branch of two that were equal."""
    arguments: Any = dict(negative_texts="a red cat", seeds=1, cond_scale=9.0, timesteps=4)
    [plain] = muse("a red cat", **arguments)
    [changed] = emphasise(muse, "a red cat", {"red": 30.0}, **arguments)
    assert plain.tobytes() != changed.tobytes()


@pytest.fixture
def counts(muse, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often texts and contexts are encoded."""
    found = dict.fromkeys(["texts", "base", "superres"], 0)

    def counted(owner: Any, method: str, name: str) -> None:
        plain = getattr(owner, method)

        def count(*arguments: Any) -> Any:
            found[name] += 1
            return plain(*arguments)

        monkeypatch.setattr(owner, method, count)

    counted(TextEncoder, "_compute", "texts")
    counted(muse.base.transformer, "encode_context", "base")
    counted(muse.superres.transformer, "encode_context", "superres")
    return found


def test_a_mask_free_edit_encodes_once(muse, counts):
    picture = to_pil(tiny.images(1, 32))[0]
    free(muse, picture, "once is enough", at=[12], seeds=1)
    assert counts == {"texts": 1, "base": 1, "superres": 1}


def test_windows_and_stages_share_their_texts(muse, counts):
    picture = to_pil(tiny.images(1, 32))[0]
    outpaint(
        muse,
        picture,
        "more of it",
        left=8,
        right=8,
        top=8,
        negative_texts="less",
        seeds=1,
        timesteps=2,
    )
    windows = counts["base"]
    assert windows > 2
    assert counts == {"texts": 2, "base": windows, "superres": windows}  # and the negative one


def test_nothing_to_draw_is_nothing_to_compute(muse, counts, passes):
    ids = tiny.ids(1)
    text = muse.base.embed_texts("as it is")
    options = muse.base.default_options.replace(seeds=0)
    assert torch.equal(muse.base.sample(text, options, canvas=ids), ids)
    assert not passes
    assert not counts["base"]


def test_an_edit_without_a_caption_needs_one_branch(muse, passes):
    mask = torch.zeros(32, 32).bool()
    mask[8:20, 8:20] = True
    inpaint(muse, tiny.images(1, 32)[0], None, mask, seeds=0, timesteps=2, cond_scale=3.0)
    assert {branches for _, branches in passes} == {1}
