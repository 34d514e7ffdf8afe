package server

import (
	"net"
	"testing"
)

func TestGate(t *testing.T) {
	addr := func(s string) net.Addr { return &net.TCPAddr{IP: net.ParseIP(s), Port: 7} }
	g := newGate(8) // 2 from each
	enter := func(s string, want bool) {
		t.Helper()
		if got := g.enter(addr(s)); got != want {
			t.Errorf("enter %s: %t", s, got)
		}
	}
	enter("10.0.0.1", true)
	enter("10.0.0.1", true)
	enter("10.0.0.1", false)
	enter("::ffff:10.0.0.1", false) // the same, written otherwise
	enter("2001:db8::1", true)
	enter("2001:db8::2", true) // the same /64
	enter("2001:db8::3", false)
	enter("2001:db8:0:1::1", true)
	enter("10.0.0.2", true)
	enter("10.0.0.3", true)
	if !g.enter(&net.UnixAddr{Name: "x"}) {
		t.Error("enter a socket: false")
	}
	enter("10.0.0.4", false) // all eight places are taken
	g.leave(addr("10.0.0.1"))
	enter("10.0.0.4", true)
	for _, s := range []string{"10.0.0.1", "2001:db8::1", "2001:db8::2", "2001:db8:0:1::1", "10.0.0.2", "10.0.0.3", "10.0.0.4"} {
		g.leave(addr(s))
	}
	g.leave(&net.UnixAddr{Name: "x"})
	if g.all != 0 || len(g.each) != 0 {
		t.Errorf("%d and %v are left", g.all, g.each)
	}
}
