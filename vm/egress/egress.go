// Package egress says which addresses of the network may be reached on behalf
// of an account.
//
// An account can name addresses (of a cache, of what a fixed-output derivation
// downloads), and whoever runs the server reaches them from a place where more
// is reachable than from the account's own: the server's loopback, the private
// network around it, the metadata service of a cloud. So only public unicast
// addresses may be reached, and what the operator listed.
//
// The rule is about the address that is connected to, not about a name: it is
// applied when a connection is made, after the name was resolved (Rule.Dialer,
// or Rule.Check by a network stack of another kind), so that a name that
// resolves to something else the next time gains nothing. An IPv4 address
// inside an IPv6 one (mapped, NAT64, 6to4) counts as the IPv4 address that it
// stands for.
//
// What it cannot know is a NAT64 prefix that a network chose for itself out of
// its public addresses, and a public address that a router before this machine
// translates to one of its own.
package egress

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// A Rule says what may be reached. The zero Rule allows public addresses only.
// It does not change once it is made; its methods are safe for concurrent use.
type Rule struct {
	nets  []netip.Prefix
	ports []netip.AddrPort // single addresses with a port
	hosts map[string]bool  // names, with a port or without
	id    string

	// own returns the addresses of this machine; nil asks the system.
	own func() ([]netip.Addr, error)
}

// ParseRule returns a rule that allows also what is listed: networks
// ("10.1.0.0/16"), addresses ("10.1.2.3", "10.1.2.3:8080", "[fd00::1]:80"), and
// hosts by name ("cache.lan", "cache.lan:8080"), whatever they resolve to.
func ParseRule(list []string) (Rule, error) {
	list = slices.Compact(slices.Sorted(slices.Values(list)))
	r := Rule{hosts: make(map[string]bool), id: strings.Join(list, " ")}
	for _, s := range list {
		if err := r.allow(s); err != nil {
			return Rule{}, fmt.Errorf("allowed address %q: %w", s, err)
		}
	}
	return r, nil
}

func (r *Rule) allow(s string) error {
	if p, err := netip.ParsePrefix(s); err == nil {
		r.nets = append(r.nets, unmapPrefix(p.Masked()))
		return nil
	}
	if a, err := netip.ParseAddr(strings.Trim(s, "[]")); err == nil {
		a = a.Unmap()
		r.nets = append(r.nets, netip.PrefixFrom(a, a.BitLen()))
		return nil
	}
	if ap, err := netip.ParseAddrPort(s); err == nil {
		r.ports = append(r.ports, netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()))
		return nil
	}
	host, port, withPort := strings.Cut(s, ":")
	if !isHost(host) {
		return fmt.Errorf("it is no network (CIDR), address or host[:port]")
	}
	if n, err := strconv.ParseUint(port, 10, 16); withPort && (err != nil || n == 0) {
		return fmt.Errorf("%q is no port", port)
	}
	r.hosts[strings.ToLower(s)] = true
	return nil
}

// ID tells rules apart: those of one ID allow the same. That of the zero Rule
// is "".
func (r Rule) ID() string { return r.id }

// unmapPrefix makes a prefix of IPv4-mapped addresses one of IPv4.
func unmapPrefix(p netip.Prefix) netip.Prefix {
	if p.Addr().Is4In6() && p.Bits() >= 96 {
		return netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p
}

// isHost reports whether s can be the name of a host.
func isHost(s string) bool {
	if s == "" || len(s) > 253 || strings.HasPrefix(s, "-") {
		return false
	}
	for i := range len(s) {
		c := s[i] | 0x20
		if !(c >= 'a' && c <= 'z' || s[i] >= '0' && s[i] <= '9' || s[i] == '-' || s[i] == '.' || s[i] == '_') {
			return false
		}
	}
	return strings.ContainsFunc(s, func(c rune) bool { return c|0x20 >= 'a' && c|0x20 <= 'z' })
}

// A RefusedError says that an address may not be reached.
type RefusedError struct {
	Addr netip.Addr
	Why  string // what kind of address it is
}

// Error implements error.
func (e *RefusedError) Error() string {
	return fmt.Sprintf("%s is %s, which is not reached for accounts", e.Addr, e.Why)
}

// Hint says what the operator can do about it.
func (e *RefusedError) Hint() string {
	return "the operator of this server can list it in allow-addresses"
}

// Check reports why an address may not be reached, or nil. host is the name
// that was resolved to it, "" if none was.
func (r Rule) Check(host string, to netip.AddrPort) error {
	if r.Lists(host, to) {
		return nil
	}
	return r.checkPublic(to.Addr())
}

// CheckHost is Check for an address of which no port is known yet: nil if there
// is a port on which it may be reached.
func (r Rule) CheckHost(host string, a netip.Addr) error {
	a = a.Unmap().WithZone("")
	host = hostKey(host)
	listed := r.Lists(host, netip.AddrPortFrom(a, 0)) ||
		slices.ContainsFunc(r.ports, func(p netip.AddrPort) bool { return p.Addr() == a })
	for h := range r.hosts {
		name, _, _ := strings.Cut(h, ":")
		listed = listed || host != "" && name == host
	}
	if listed {
		return nil
	}
	return r.checkPublic(a)
}

// checkPublic reports why an address is none that all may reach.
func (r Rule) checkPublic(to netip.Addr) error {
	a := to
	if why := Special(a); why != "" {
		return &RefusedError{a, why}
	}
	own := r.own
	if own == nil {
		own = ownAddresses
	}
	mine, err := own()
	if err != nil {
		return fmt.Errorf("list own addresses: %w", err)
	}
	for {
		if slices.Contains(mine, a.Unmap().WithZone("")) {
			return &RefusedError{to, "an address of this server"}
		}
		inner, ok := embedded(a)
		if !ok {
			return nil
		}
		a = inner
	}
}

// Lists reports whether the operator allowed it, whatever it is.
func (r Rule) Lists(host string, to netip.AddrPort) bool {
	host = hostKey(host)
	if host != "" && (r.hosts[host] || r.hosts[host+":"+strconv.Itoa(int(to.Port()))]) {
		return true
	}
	a := to.Addr().Unmap().WithZone("")
	if slices.Contains(r.ports, netip.AddrPortFrom(a, to.Port())) {
		return true
	}
	return slices.ContainsFunc(r.nets, func(p netip.Prefix) bool { return p.Contains(a) })
}

// hostKey is a name as rules have it.
func hostKey(host string) string { return strings.ToLower(strings.TrimSuffix(host, ".")) }

// Dialer returns a dialer for connections to host, which refuses addresses at
// the moment it would connect to them.
func (r Rule) Dialer(host string) *net.Dialer {
	return &net.Dialer{Control: func(network, address string, _ syscall.RawConn) error {
		to, err := netip.ParseAddrPort(address)
		if err != nil {
			return fmt.Errorf("%s %s: %w", network, address, err)
		}
		return r.Check(host, to)
	}}
}

// ownAddresses lists the addresses of this machine's interfaces.
func ownAddresses() ([]netip.Addr, error) {
	list, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	var own []netip.Addr
	for _, a := range list {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			own = append(own, p.Addr().Unmap().WithZone(""))
		}
	}
	return own, nil
}

// Special says in a few words what kind of address a is if it is not a public
// unicast one, else "". It is a pure function of the address (IANA's registries
// of special-purpose addresses).
func Special(a netip.Addr) string {
	a = a.Unmap().WithZone("")
	if !a.IsValid() {
		return "no address"
	}
	for {
		for _, s := range special {
			if s.net.Contains(a) {
				return s.why
			}
		}
		if a.Is6() && !global6.Contains(a) && !nat64.Contains(a) {
			return "not a public address"
		}
		inner, ok := embedded(a)
		if !ok {
			return ""
		}
		a = inner
	}
}

// embedded returns the IPv4 address that an IPv6 one stands for.
func embedded(a netip.Addr) (netip.Addr, bool) {
	a = a.WithZone("")
	b := a.As16()
	switch {
	case a.Is4In6():
		return a.Unmap(), true
	case nat64.Contains(a):
		return v4(binary.BigEndian.Uint32(b[12:])), true
	case sixToFour.Contains(a):
		return v4(binary.BigEndian.Uint32(b[2:])), true
	}
	return netip.Addr{}, false
}

func v4(n uint32) netip.Addr {
	return netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
}

var (
	global6   = netip.MustParsePrefix("2000::/3")
	nat64     = netip.MustParsePrefix("64:ff9b::/96")
	sixToFour = netip.MustParsePrefix("2002::/16")
)

// special are the networks that are not reached. Of IPv6 those inside 2000::/3
// are enough, the others are named for the message.
var special = func() (list []struct {
	net netip.Prefix
	why string
}) {
	for _, s := range [...][2]string{
		{"0.0.0.0/8", "an address of this network"},
		{"10.0.0.0/8", "a private address"},
		{"100.64.0.0/10", "an address of a carrier's own network"},
		{"127.0.0.0/8", "a loopback address"},
		{"168.63.129.16/32", "an address of a cloud's host"},
		{"169.254.0.0/16", "a link-local address"},
		{"172.16.0.0/12", "a private address"},
		{"192.0.0.0/24", "a special address"},
		{"192.0.2.0/24", "an address for documentation"},
		{"192.88.99.0/24", "a special address"},
		{"192.168.0.0/16", "a private address"},
		{"198.18.0.0/15", "an address for benchmarks"},
		{"198.51.100.0/24", "an address for documentation"},
		{"203.0.113.0/24", "an address for documentation"},
		{"224.0.0.0/4", "a multicast address"},
		{"240.0.0.0/4", "a reserved address"},
		{"::/128", "no address"},
		{"::1/128", "a loopback address"},
		{"64:ff9b:1::/48", "an address of a local translator"},
		{"2001::/23", "a special address"}, // Teredo, benchmarks, ORCHID
		{"2001:db8::/32", "an address for documentation"},
		{"3fff::/20", "an address for documentation"},
		{"fc00::/7", "a private address"},
		{"fe80::/10", "a link-local address"},
		{"fec0::/10", "a private address"},
		{"ff00::/8", "a multicast address"},
	} {
		list = append(list, struct {
			net netip.Prefix
			why string
		}{netip.MustParsePrefix(s[0]), s[1]})
	}
	return list
}()
