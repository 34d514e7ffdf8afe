package egress

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
)

func addr(s string) netip.AddrPort { return netip.AddrPortFrom(netip.MustParseAddr(s), 443) }

// nobody has no addresses.
func nobody() ([]netip.Addr, error) { return nil, nil }

func TestCheck(t *testing.T) {
	r := Rule{own: func() ([]netip.Addr, error) {
		return []netip.Addr{netip.MustParseAddr("8.8.4.4"), netip.MustParseAddr("2a01:4f8::7")}, nil
	}}
	for _, s := range []string{
		"0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.9.9.9", "168.63.129.16",
		"169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.168.1.1", "198.18.0.1",
		"198.51.100.7", "203.0.113.7", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255",
		"::", "::1", "::127.0.0.1", "::8.8.8.8", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1",
		"ff02::1", "2001:db8::1", "2001::1", "100::1", "5f00::1",
		"::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::ffff:0:8.8.8.8",
		"64:ff9b::127.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b::a00:1", "64:ff9b:1::8.8.8.8",
		"2002:7f00:1::1", "2002:a9fe:a9fe::", "2002:c0a8:101::1",
		"8.8.4.4", "::ffff:8.8.4.4", "64:ff9b::8.8.4.4", "2002:808:404::1", "2a01:4f8::7",
	} {
		var refused *RefusedError
		if err := r.Check("name", addr(s)); !errors.As(err, &refused) || refused.Why == "" {
			t.Errorf("%s: %v", s, err)
		}
	}
	for _, s := range []string{"8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1", "2a01:4f8::8", "2606:4700::1"} {
		if err := r.Check("name", addr(s)); err != nil {
			t.Errorf("%s: %v", s, err)
		}
	}
}

func TestCheckListed(t *testing.T) {
	r, err := ParseRule([]string{"10.1.0.0/16", "192.168.7.7", "192.168.8.8:443", "[fd00::1]:443", "cache.lan", "Other.lan:443", "fd01::/16", "::ffff:10.9.0.0/112"})
	if err != nil {
		t.Fatal(err)
	}
	r.own = nobody
	for _, s := range [][2]string{
		{"", "10.1.2.3"}, {"x", "::ffff:10.1.2.3"}, {"", "192.168.7.7"}, {"", "192.168.8.8"}, {"", "fd00::1"}, {"", "fd01::9"}, {"", "10.9.3.4"},
		{"cache.lan", "127.0.0.1"}, {"CACHE.lan.", "127.0.0.1"}, {"other.lan", "127.0.0.1"},
	} {
		if err := r.Check(s[0], addr(s[1])); err != nil {
			t.Errorf("%s: %v", s, err)
		}
	}
	for _, s := range [][2]string{{"", "10.2.2.3"}, {"x.cache.lan", "127.0.0.1"}, {"", "fd00::2"}, {"", "64:ff9b::10.1.2.3"}} {
		if r.Check(s[0], addr(s[1])) == nil {
			t.Errorf("%s is allowed", s)
		}
	}
	for _, s := range []string{"192.168.8.8:444", "[fd00::1]:80"} {
		if r.Check("other.lan", netip.MustParseAddrPort(s)) == nil {
			t.Errorf("%s is allowed", s)
		}
	}
}

func TestParseRuleMalformed(t *testing.T) {
	for _, s := range []string{"", "10.0.0.0/33", "http://x", "a b", "x:", "x:0", "x:65536", "x:y", "-x", "1.2.3", "*", "*.lan", "x/8", strings.Repeat("a", 300)} {
		if r, err := ParseRule([]string{s}); err == nil {
			t.Errorf("%q: %+v", s, r)
		}
	}
}

// What is connected to is checked, whatever the name was before.
func TestDialer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx := context.Background()
	_, err = Rule{}.Dialer("localhost").DialContext(ctx, "tcp", l.Addr().String())
	var refused *RefusedError
	if !errors.As(err, &refused) || !strings.Contains(refused.Hint(), "allow-addresses") {
		t.Errorf("loopback: %v", err)
	}
	r, err := ParseRule([]string{l.Addr().String()})
	if err != nil {
		t.Fatal(err)
	}
	c, err := r.Dialer("localhost").DialContext(ctx, "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func FuzzSpecial(f *testing.F) {
	for _, s := range []string{"10.0.0.1", "8.8.8.8", "::ffff:10.0.0.1", "64:ff9b::1.2.3.4", "2002:7f00:1::"} {
		f.Add(netip.MustParseAddr(s).AsSlice())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		a, _ := netip.AddrFromSlice(b)
		if Special(a) == "" && (!a.IsGlobalUnicast() || a.Unmap().IsPrivate() || a.Unmap().IsLoopback()) {
			t.Errorf("%s is public", a)
		}
	})
}

// Without a port an address may be reached if there is one on which it is; an
// address that is not may not, whatever its name.
func TestCheckHost(t *testing.T) {
	r, err := ParseRule([]string{"10.1.0.0/16", "192.168.8.8:443", "cache.lan", "other.lan:8080"})
	if err != nil {
		t.Fatal(err)
	}
	r.own = nobody
	for _, s := range [][2]string{{"x", "8.8.8.8"}, {"x", "10.1.2.3"}, {"", "::ffff:192.168.8.8"}, {"Cache.lan.", "127.0.0.1"}, {"other.lan", "127.0.0.1"}} {
		if err := r.CheckHost(s[0], netip.MustParseAddr(s[1])); err != nil {
			t.Errorf("%s: %v", s, err)
		}
	}
	for _, s := range [][2]string{{"x", "10.2.2.3"}, {"", "127.0.0.1"}, {"lan", "127.0.0.1"}, {"x.cache.lan", "127.0.0.1"}, {"", "192.168.8.9"}} {
		if r.CheckHost(s[0], netip.MustParseAddr(s[1])) == nil {
			t.Errorf("%s is allowed", s)
		}
	}
}

// Rules that allow the same list have one id.
func TestRuleID(t *testing.T) {
	ids := map[string]bool{}
	for _, list := range [][]string{nil, {"a.lan", "10.0.0.1"}, {"10.0.0.1", "a.lan", "a.lan"}, {"10.0.0.1"}} {
		r, err := ParseRule(list)
		if err != nil {
			t.Fatal(err)
		}
		ids[r.ID()] = true
	}
	if len(ids) != 3 || !ids[(Rule{}).ID()] {
		t.Errorf("ids %v", ids)
	}
}
