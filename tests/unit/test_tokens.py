"""Documents and packing: every token of the text, once, in its place; and the errors of bad text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.core.errors import ConfigError, DataError
from interp.data.documents import Documents
from interp.data.tokens import Packing, TokenBlock, TokenSource
from tests.families import word_tokenizer

TEXTS = ["w1 w2 w3", "w4 w5 w6 w7 w8 w9 w10", "", "w11", "w12 w13 w14 w15 w16"]
PACKINGS: list[Packing] = ["concat", "block_diagonal", "one_doc"]


def source(data: Any = TEXTS, **options: Any) -> TokenSource:
    return TokenSource(data, word_tokenizer(), **{"ctx": 6, "rows": 2, "bos": True, **options})


def column(blocks: list[TokenBlock], name: str) -> Tensor:
    return torch.cat([getattr(block, name) for block in blocks])


def own(blocks: list[TokenBlock]) -> list[tuple[int, int, int]]:
    """(document, position, id) of every token of the text."""
    columns = [column(blocks, name).flatten().tolist() for name in ("doc", "pos", "ids")]
    return [row for row in zip(*columns, strict=True) if row[1] >= 0]


def planted() -> list[tuple[int, int, int]]:
    return [(d, p, int(w[1:])) for d, text in enumerate(TEXTS) for p, w in enumerate(text.split())]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("packing", ["concat", "block_diagonal"])
def test_packing_keeps_every_token_once_with_its_document_and_position(packing: Packing, bos: bool) -> None:
    assert own(list(source(packing=packing, bos=bos).blocks())) == planted()


def test_concat_puts_bos_before_each_document_and_row() -> None:
    blocks = list(source(packing="concat").blocks())
    assert column(blocks, "ids").tolist() == [
        [0, 1, 2, 3, 0, 4],
        [0, 5, 6, 7, 8, 9],
        [0, 10, 0, 11, 0, 12],
        [0, 13, 14, 15, 16, 0],
    ]
    assert column(blocks, "mask").tolist()[-1] == [True] * 5 + [False]
    assert torch.equal(column(blocks, "special"), column(blocks, "ids") == 0)
    assert all(block.position_ids is None for block in blocks)


def test_without_bos_packed_documents_are_separated_by_eos() -> None:
    ids = column(list(source(packing="concat", bos=False).blocks()), "ids").flatten().tolist()
    assert ids[:9] == [1, 2, 3, 0, 4, 5, 6, 7, 8]


def test_block_diagonal_restarts_positions_at_each_document_and_never_asks_for_a_mask() -> None:
    blocks = list(source(packing="block_diagonal").blocks())
    assert column(blocks, "position_ids").tolist() == [
        [0, 1, 2, 3, 0, 1],
        [0, 1, 2, 3, 4, 5],
        [0, 1, 0, 1, 0, 1],
        [0, 1, 2, 3, 4, 0],
    ]
    assert all(bool(block.inputs.mask.all()) for block in blocks)


def test_one_doc_gives_each_document_its_row_cut_or_padded() -> None:
    blocks = list(source(packing="one_doc").blocks())
    assert column(blocks, "ids").tolist() == [
        [0, 1, 2, 3, 0, 0],
        [0, 4, 5, 6, 7, 8],
        [0, 11, 0, 0, 0, 0],
        [0, 12, 13, 14, 15, 16],
    ]
    assert column(blocks, "mask").sum(1).tolist() == [4, 6, 2, 6]
    assert column(blocks, "doc")[2].tolist() == [3, 3, -1, -1, -1, -1]


def test_documents_packed_alone_come_by_length_in_blocks_no_wider_than_their_longest() -> None:
    given = list(enumerate(TEXTS, 5))
    blocks = list(source(packing="one_doc").pack(given))
    assert [block.ids.shape[1] for block in blocks] == [6, 4]
    lengths = [int(n) for block in blocks for n in block.mask.sum(1)]
    assert lengths == sorted(lengths, reverse=True)
    # Every document once, cut at the row's end as ever.
    expected = [(d + 5, p, i) for d, p, i in planted() if p < 5]
    rows = [row for block in blocks for row in own([block])]
    assert sorted(rows) == expected
    assert not list(source().pack([]))


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("packing", PACKINGS)
def test_going_on_at_any_cursor_gives_the_same_rows_as_not_stopping(packing: Packing, bos: bool) -> None:
    tokens = source(packing=packing, bos=bos, rows=1)
    whole = list(tokens.blocks())
    assert len(whole) > 3
    for i, block in enumerate(whole):
        rest = list(tokens.blocks(block.cursor))
        for name in ("ids", "mask", "doc", "pos", "special"):
            expected = [getattr(b, name).tolist() for b in whole[i + 1 :]]
            assert [getattr(b, name).tolist() for b in rest] == expected


def test_the_default_bos_is_the_tokenizers_own_habit() -> None:
    from tokenizers.processors import TemplateProcessing

    assert not TokenSource(TEXTS, word_tokenizer()).bos
    prepending = word_tokenizer()
    prepending.backend_tokenizer.post_processor = TemplateProcessing(single="w0 $A", special_tokens=[("w0", 0)])
    tokens = TokenSource(TEXTS, prepending)
    assert tokens.bos and tokens.describe()["bos"] is True
    # The habit is not applied twice.
    assert next(iter(tokens.blocks())).ids[0, :3].tolist() == [0, 1, 2]


def test_parts_and_ranks_share_out_every_document_without_overlap() -> None:
    texts = [f"w{i}" for i in range(1, 60)]
    shares = [
        [i for i, _ in Documents(texts, part=part, hold_out_every=5, rank=rank, world_size=3).read()]
        for part in ("train", "held_out")
        for rank in range(3)
    ]
    assert sorted(i for share in shares for i in share) == list(range(59))
    assert [i for share in shares[3:] for i in share if i % 5 != 4] == []
    assert min(map(len, shares)) > 0
    for start in (0, 7, 30):
        late = Documents(texts, part="train", hold_out_every=5, rank=1, world_size=3).read(start)
        assert [i for i, _ in late] == [i for i in shares[1] if i >= start]


def test_a_list_a_text_file_json_lines_a_folder_and_a_dataset_give_the_same_text(tmp_path: Path) -> None:
    from datasets import Dataset

    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"id": i, "story": t}) + "\n" for i, t in enumerate(TEXTS)), encoding="utf-8")
    folder = tmp_path / "many"
    (folder / "inner").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (folder / ("inner" if i > 2 else ".") / f"{i}.txt").write_text(text, encoding="utf-8")
    expected = [(i, t) for i, t in enumerate(TEXTS)]
    assert list(Documents(TEXTS).read()) == expected
    assert list(Documents(lines, field="story").read()) == expected
    assert [t for _, t in Documents(str(folder)).read()] == TEXTS
    dataset = Dataset.from_dict({"story": TEXTS})
    assert list(Documents(dataset, field="story").read()) == expected
    streamed = Documents(dataset.to_iterable_dataset(), field="story")
    assert list(streamed.read()) == expected and list(streamed.read(3)) == expected[3:]


def test_a_source_by_number_is_asked_for_the_documents_of_its_part_alone() -> None:
    class ByNumber:
        def __init__(self) -> None:
            self.asked: list[int] = []

        def __getitem__(self, index: int) -> str:
            self.asked.append(index)
            return f"w{index}"

    texts = ByNumber()
    held_out = Documents(texts, part="held_out", hold_out_every=5, rank=1, world_size=2).read(7)
    assert [next(held_out) for _ in range(2)] == [(9, "w9"), (19, "w19")]
    assert texts.asked == [9, 19]


def test_a_dict_of_splits_is_refused_with_their_names() -> None:
    with pytest.raises(DataError, match=r"got dict; choose one of .'train', 'test'."):
        next(Documents({"train": TEXTS, "test": TEXTS}).read())


def test_only_as_many_documents_as_needed_are_read() -> None:
    class Endless:
        def __init__(self) -> None:
            self.read = 0

        def __iter__(self) -> Any:
            while True:
                self.read += 1
                yield "w1 w2 w3"

    texts = Endless()
    blocks = source(texts).blocks()
    for _ in range(3):
        next(blocks)
    assert texts.read <= 65


@pytest.mark.parametrize(
    ("content", "field", "message"),
    [
        ('{"body": "a", "id": 1}\n', "text", r"line 1 has no field 'text'; its fields are: body, id"),
        ('{"text": "a"}\n{"text": 3}\n', "text", r"line 2: field 'text' holds a int"),
        ('{"text": "a"\n', "text", r"line 1 is not JSON"),
        ("[1]\n", "text", r"line 1 is a list"),
        ("", "text", r"holds no document"),
        ('{"text": ""}\n', "text", r"gives no tokens"),
    ],
)
def test_bad_json_lines_are_refused_with_their_place(tmp_path: Path, content: str, field: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        list(source(Documents(path, field=field)).blocks())


def test_missing_and_unreadable_sources_are_refused_with_what_is_near(tmp_path: Path) -> None:
    (tmp_path / "stories.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"did you mean 'stories\.jsonl'"):
        list(Documents(tmp_path / "storys.jsonl").read())
    with pytest.raises(DataError, match=r"not UTF-8"):
        list(Documents(tmp_path / "stories.jsonl").read())
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(DataError, match=r"cannot read \.pdf; expected \.txt"):
        list(Documents(tmp_path / "a.pdf").read())
    with pytest.raises(DataError, match=r"can be read twice"):
        list(Documents(iter(TEXTS)).read())
    with pytest.raises(DataError, match=r"document 1 of a list of 2 texts is a int"):
        list(Documents(["w1", 3]).read())


def test_a_hub_dataset_without_network_names_the_way_by_a_file() -> None:
    with pytest.raises(DataError, match=r"save it as a \.jsonl file"):
        list(Documents("hf://nobody-interp/no-such-dataset").read())


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="packing 'rows'"):
        source(packing="rows")
    with pytest.raises(ConfigError, match="ctx is 1"):
        source(ctx=1)
    with pytest.raises(ConfigError, match="rank 2 of world_size 2"):
        Documents(TEXTS, rank=2, world_size=2)
    tokenizer = word_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(ConfigError, match="no BOS token"):
        TokenSource(TEXTS, tokenizer, bos=True)
    with pytest.raises(DataError, match=r"'held_out' part"):
        list(source(Documents(TEXTS, part="held_out")).blocks())
