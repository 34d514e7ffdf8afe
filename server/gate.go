package server

import (
	"net"
	"net/netip"
	"sync"
)

// A gate bounds the connections that have not authenticated yet, in all and
// for each address, so that nobody can keep others out by opening many.
type gate struct {
	max, maxEach int

	mu   sync.Mutex // guards what follows
	all  int
	each map[netip.Prefix]int
}

func newGate(max int) *gate {
	return &gate{max: max, maxEach: (max + 3) / 4, each: map[netip.Prefix]int{}}
}

// enter counts a connection; it reports false if there is no room for it.
func (g *gate) enter(addr net.Addr) bool {
	from := sender(addr)
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.all >= g.max || g.each[from] >= g.maxEach {
		return false
	}
	g.all++
	g.each[from]++
	return true
}

// leave ends the counting of a connection that entered.
func (g *gate) leave(addr net.Addr) {
	from := sender(addr)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.all--
	if g.each[from]--; g.each[from] == 0 {
		delete(g.each, from)
	}
}

// sender returns whom an address stands for: an IPv4 address, or the /64 that
// one holder of IPv6 addresses has at least. All others share one place.
func sender(addr net.Addr) netip.Prefix {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	ip := tcp.AddrPort().Addr().Unmap().WithZone("")
	bits := 32
	if ip.Is6() {
		bits = 64
	}
	p, err := ip.Prefix(bits)
	if err != nil {
		return netip.Prefix{}
	}
	return p
}
