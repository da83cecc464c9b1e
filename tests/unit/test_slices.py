"""A request that was cut: its errors name the items as its caller counts them."""

from workers.slices import error_in_request


def test_an_error_of_a_slice_names_the_items_of_its_request() -> None:
    item = {"index": 1, "code": "INVALID_INPUT", "message": "no", "param": "items[1].images[0].data"}
    error = {"code": "INVALID_INPUT", "message": "no", "param": "items[1].images[0].data", "items": [item]}
    told = error_in_request(error, first=10)
    assert told["param"] == "items[11].images[0].data"
    assert told["items"] == [{**item, "index": 11, "param": "items[11].images[0].data"}]
    assert error_in_request(error, first=0) == error


def test_an_error_of_no_item_stays_as_it_is() -> None:
    for error in ({"code": "X", "param": "query.text"}, {"code": "X"}, {"code": "X", "param": None}):
        assert error_in_request(error, first=3) == error
