"""Which addresses, hosts and ports may be connected to."""

import ipaddress

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.source_network import is_public
from worker.source_policy import HostRule

PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "93.184.216.34",
    "2606:4700:4700::1111",
    "2a00:1450:4001:830::200e",
    "::ffff:8.8.8.8",  # mapped
    "64:ff9b::808:808",  # NAT64 of 8.8.8.8
    "2002:808:808::1",  # 6to4 of 8.8.8.8
]
NOT_PUBLIC = [
    *("0.0.0.0", "0.1.2.3", "127.0.0.1", "127.255.255.254", "10.0.0.1", "172.16.0.1"),
    *("172.31.255.255", "192.168.1.1", "169.254.169.254", "169.254.170.2", "100.64.0.1"),
    *("100.100.100.200", "192.0.0.192", "192.0.2.1", "198.18.0.1", "203.0.113.1", "240.0.0.1"),
    *("224.0.0.1", "239.255.255.250", "255.255.255.255", "192.88.99.1", "168.63.129.16"),
    *("::", "::1", "fe80::1", "fe80::1%eth0", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1"),
    *("::127.0.0.1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:0:127.0.0.1"),
    *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::808:808", "2002:7f00:1::1"),
    *("2002:a9fe:a9fe::", "2001::1", "2001:db8::1", "100::1", "3fff::1", "5f00::1", "4000::1"),
]


@pytest.mark.parametrize("address", PUBLIC)
def test_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@given(st.ip_addresses(v=4))
def test_no_form_of_an_address_is_judged_more_kindly(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    forms = (0xFFFF << 32 | number, 0x64FF9B << 96 | number, 0x2002 << 112 | number << 80)
    for form in forms:
        assert is_public(ipaddress.IPv6Address(form)) == is_public(address)
    assert not is_public(ipaddress.IPv6Address(number))  # the deprecated ::/96


@pytest.mark.parametrize(
    ("pattern", "uri", "allowed"),
    [
        ("example.com", "https://example.com/a", True),
        ("example.com", "https://EXAMPLE.com./a", True),
        ("Example.COM", "http://example.com/", True),
        ("example.com", "https://www.example.com/", False),
        ("example.com", "https://example.com.evil.com/", False),
        ("example.com", "https://notexample.com/", False),
        ("*.example.com", "https://a.b.example.com/", True),
        ("*.example.com", "https://example.com/", False),
        ("*.example.com", "https://evilexample.com/", False),
        ("*.example.com", "https://example.com.evil.com/", False),
        ("*", "https://anything.test/", True),
        ("*", "https://anything.test:22/", False),
        ("example.com", "https://example.com:443/", True),
        ("example.com", "https://example.com:80/", False),
        ("example.com", "https://example.com:8443/", False),
        ("example.com:8443", "https://example.com:8443/", True),
        ("example.com:8443", "https://example.com/", False),
        ("example.com:*", "https://example.com:1/", True),
        ("127.0.0.1", "http://127.0.0.1/", True),
        ("127.0.0.1", "http://127.1/", False),
        ("[::1]:8080", "http://[::1]:8080/", True),
        ("[::1]", "http://[::1]/", True),
        ("::1", "http://[::1]/", True),
        ("::1", "http://[::1]:8080/", False),
        ("2001:DB8::1", "https://[2001:db8::1]/", True),
        ("[2001:db8::1]:*", "https://[2001:db8::1]:8/", True),
        ("straße.de", "https://straße.de/", True),
        ("straße.de", "https://strasse.de/", False),
        ("*.straße.de", "https://a.straße.de/", True),
        ("*.straße.de", "https://a.strasse.de/", False),
        ("βόλος.com.", "https://βόλος.com/", True),
        ("under_score.example", "https://under_score.example/", True),
        ("bücher.example", "https://xn--bcher-kva.example/", True),
        ("xn--bcher-kva.example", "https://bücher.example/", True),
        ("example.com", "https://example.com%2eevil.com/", False),
    ],
)
def test_host_rules(pattern: str, uri: str, allowed: bool) -> None:
    url = httpx.URL(uri)
    host = url.raw_host.decode("ascii")
    assert HostRule.parse(pattern).allows(url.scheme, host, url.port) is allowed
