import numpy as np

from cllm4rec.arrays.ids import NOBODY, TokenSpace
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.data.documents import TEXT_KINDS, Documents, Kind, Prompts

SPACE = TokenSpace(num_words=100, num_users=10, num_items=20)
PROMPTS = Prompts(
    has_interacted=[1, 2],
    writes_review=[3],
    colon=[4],
    biography=[5],
    content=[6],
    copula=[7],
    comma=[8],
    will_interact=[9, 10],
)
USER_3, USER_4 = 103, 104
ITEM_0, ITEM_5 = 110, 115


def some_documents() -> Documents:
    users, items = np.array([3, 4]), np.array([5, 0])
    return Documents.concat(
        [
            PROMPTS.interactions(SPACE, users, Ragged.from_lists([[5, 0], [0]])),
            PROMPTS.reviews(SPACE, users, items, Ragged.from_lists([[50, 51], [52]])),
            PROMPTS.user_texts(SPACE, users, Ragged.from_lists([[60], [61]])),
            PROMPTS.item_texts(SPACE, items, Ragged.from_lists([[70], [71]])),
        ]
    )


def prompt_and_main(documents: Documents, kind: Kind) -> list[tuple[list[int], list[int]]]:
    mine = documents.of_kinds([kind])
    return list(zip(mine.prompt.tolist(), mine.main.tolist(), strict=True))


def test_every_kind_reads_as_the_table_of_the_method_says() -> None:
    documents = some_documents()
    assert prompt_and_main(documents, Kind.INTERACTIONS) == [
        ([USER_3, 1, 2], [ITEM_5, ITEM_0]),
        ([USER_4, 1, 2], [ITEM_0]),
    ]
    assert prompt_and_main(documents, Kind.REVIEW) == [
        ([USER_3, 3, ITEM_5, 4], [50, 51]),
        ([USER_4, 3, ITEM_0, 4], [52]),
    ]
    assert prompt_and_main(documents, Kind.USER_TEXT) == [([5, USER_3, 7], [60]), ([5, USER_4, 7], [61])]
    assert prompt_and_main(documents, Kind.ITEM_TEXT) == [([6, ITEM_5, 7], [70]), ([6, ITEM_0, 7], [71])]


def test_a_recommendation_prompt_holds_the_history_twice_the_user_and_no_target() -> None:
    document = PROMPTS.recommendation(SPACE, np.array([3]), Ragged.from_lists([[5, 0]]), Ragged.from_lists([[7, 8]]))
    assert document.prompt.tolist() == [[USER_3, 1, 2, ITEM_5, ITEM_0, 8, USER_3, 9, 10]]
    assert document.main.tolist() == [[]]
    assert document.target.tolist() == [[7, 8]]
    assert document.lengths.tolist() == [PROMPTS.overhead() + 2]


def test_an_unknown_or_hidden_user_is_nobody_in_the_prompt() -> None:
    history = Ragged.from_lists([[5], [5]])
    unknown = PROMPTS.interactions(SPACE, np.array([-1, 3]), history)
    hidden = PROMPTS.interactions(SPACE, np.array([3, 3]), history, hidden=np.array([True, False]))
    for documents in (unknown, hidden):
        assert documents.prompt.tolist() == [[NOBODY, 1, 2], [USER_3, 1, 2]]
    assert hidden.user.tolist() == [3, 3], "whose document it is does not change when the user is hidden"


def test_documents_survive_the_round_trip_through_arrow() -> None:
    documents = some_documents()
    again = Documents.from_arrow(documents.to_arrow())
    for name in ("kind", "user", "item"):
        assert getattr(again, name).tolist() == getattr(documents, name).tolist()
    assert again.prompt.tolist() == documents.prompt.tolist()
    assert again.main.tolist() == documents.main.tolist()


def test_order_does_not_depend_on_how_documents_were_put_together() -> None:
    documents = some_documents().in_order()
    shuffled = documents.take(np.random.default_rng(0).permutation(len(documents))).in_order()
    assert shuffled.prompt.tolist() == documents.prompt.tolist()
    assert shuffled.main.tolist() == documents.main.tolist()
    assert documents.kind.tolist() == sorted(documents.kind.tolist())


def test_of_kinds_keeps_the_kinds_asked_for() -> None:
    documents = some_documents()
    assert set(documents.of_kinds(TEXT_KINDS).kind.tolist()) == {int(kind) for kind in TEXT_KINDS}
    assert len(documents.of_kinds([Kind.RECOMMENDATION])) == 0
