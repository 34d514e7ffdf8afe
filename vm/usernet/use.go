package usernet

import (
	"net/netip"
	"slices"
	"sync"
)

// What is kept of a guest's use of its network, for people: a guest can make
// both lists as long as it likes.
const (
	maxHosts    = 100
	maxRefusals = 20
)

// A Use is what a guest did with its network.
type Use struct {
	Sent, Received int64 // bytes of connections, as the guest sees it
	// Hosts are those that it was connected to, in the order of their first
	// connections. MoreHosts is how many connections are not among them.
	Hosts     []Host
	MoreHosts int
	// Refusals are what it was not connected to.
	Refusals []Refusal
	// Private says that it was connected to an address that only its rule
	// allows.
	Private bool
}

// A Host is an address and port that a guest was connected to.
type Host struct {
	Name           string // by which it found the address; "" if it did not ask
	Address        netip.AddrPort
	Sent, Received int64
}

// A Refusal is what a guest was not connected to, and why.
type Refusal struct {
	Name    string
	Address netip.AddrPort // not valid for a name alone
	Why     string
}

// String names what was refused.
func (r Refusal) String() string {
	s := r.Name
	switch {
	case s == "":
		s = r.Address.String()
	case r.Address.IsValid():
		s += " (" + r.Address.String() + ")"
	}
	return s + ": " + r.Why
}

// A use is a Use that grows.
type use struct {
	max int64 // bytes; zero is no bound

	mu sync.Mutex // guards what follows, and what hostUse changes
	Use
}

func newUse(maxBytes int64) *use { return &use{max: maxBytes} }

func (u *use) get() Use {
	u.mu.Lock()
	defer u.mu.Unlock()
	c := u.Use
	c.Hosts, c.Refusals = slices.Clone(c.Hosts), slices.Clone(c.Refusals)
	return c
}

// refuse keeps that something was refused.
func (u *use) refuse(to netip.AddrPort, name, why string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.refuseLocked(Refusal{name, to, why})
}

func (u *use) refuseLocked(r Refusal) {
	if len(u.Refusals) < maxRefusals && !slices.Contains(u.Refusals, r) {
		u.Refusals = append(u.Refusals, r)
	}
}

// private says that an address was reached that is not public.
func (u *use) private() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.Private = true
}

// spent reports whether the guest has used up its bytes.
func (u *use) spent() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.spentLocked()
}

func (u *use) spentLocked() bool { return u.max > 0 && u.Sent+u.Received > u.max }

// A hostUse counts the bytes of one connection.
type hostUse struct {
	u     *use
	index int // in u.Hosts; -1 if there is no room
	name  string
	to    netip.AddrPort
}

// host returns what counts for a host.
func (u *use) host(name string, to netip.AddrPort) *hostUse {
	u.mu.Lock()
	defer u.mu.Unlock()
	i := slices.IndexFunc(u.Hosts, func(h Host) bool { return h.Name == name && h.Address == to })
	if i < 0 && len(u.Hosts) < maxHosts {
		i = len(u.Hosts)
		u.Hosts = append(u.Hosts, Host{Name: name, Address: to})
	} else if i < 0 {
		u.MoreHosts++
	}
	return &hostUse{u, i, name, to}
}

// sent counts n bytes that the guest has sent; an error says that it may send
// no more.
func (h *hostUse) sent(n int) error { return h.count(int64(n), 0) }

// received is sent for what the guest has received.
func (h *hostUse) received(n int) error { return h.count(0, int64(n)) }

func (h *hostUse) count(sent, received int64) error {
	h.u.mu.Lock()
	defer h.u.mu.Unlock()
	h.u.Sent += sent
	h.u.Received += received
	if h.index >= 0 {
		host := &h.u.Hosts[h.index]
		host.Sent += sent
		host.Received += received
	}
	if !h.u.spentLocked() {
		return nil
	}
	h.u.refuseLocked(Refusal{h.name, h.to, errTooMuch.Error()})
	return errTooMuch
}
