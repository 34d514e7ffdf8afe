package usernet

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/time/rate"

	"nbd/vm/egress"
)

// HostName is the name of the host that the guest runs on: of the addresses of
// its loopback that are listed, which are the gateway's to the guest.
const HostName = "host.nbd.internal"

const (
	maxLookups     = 16 // at once
	lookupsASecond = 50
	lookupBurst    = 500
	lookupPatience = 10 * time.Second
	maxNames       = 2048 // addresses whose names are known
	maxNamesOfAddr = 4
	maxAnswers     = 8  // addresses in an answer, which fits into 512 bytes then
	answerTTL      = 60 // seconds
	maxUDP         = 512
)

// A resolver answers the guest's questions for addresses. It asks the host's
// resolver; an address that may not be reached is left out.
type resolver struct {
	rule   egress.Rule
	ipv6   bool
	use    *use
	lookup func(ctx context.Context, name string) ([]netip.Addr, error)
	slots  chan struct{}
	pace   *rate.Limiter

	mu    sync.Mutex // guards names
	names map[netip.Addr][]string
}

func newResolver(cfg Config, ipv6 bool, u *use) *resolver {
	r := &resolver{rule: cfg.Rule, ipv6: ipv6, use: u, lookup: cfg.lookup, slots: make(chan struct{}, maxLookups),
		pace: rate.NewLimiter(lookupsASecond, lookupBurst), names: make(map[netip.Addr][]string)}
	if r.lookup == nil {
		r.lookup = func(ctx context.Context, name string) ([]netip.Addr, error) {
			// The dot at its end keeps the host's search domains away.
			return (&net.Resolver{PreferGo: true}).LookupNetIP(ctx, "ip", name+".")
		}
	}
	return r
}

// start runs f unless too many lookups run, or come too fast: then the question
// is lost, and the guest asks again.
func (r *resolver) start(f func()) bool {
	if !r.pace.Allow() {
		return false
	}
	select {
	case r.slots <- struct{}{}:
	default:
		return false
	}
	go func() {
		defer func() { <-r.slots }()
		f()
	}()
	return true
}

// answer returns the answer to a query (RFC 1035); nil if it is none.
func (r *resolver) answer(ctx context.Context, query []byte) []byte {
	var p dnsmessage.Parser
	head, err := p.Start(query)
	if err != nil || head.Response {
		return nil
	}
	reply := dnsmessage.Header{ID: head.ID, Response: true, OpCode: head.OpCode, RecursionDesired: head.RecursionDesired, RecursionAvailable: true}
	questions, err := p.AllQuestions()
	if err != nil || head.OpCode != 0 || len(questions) != 1 {
		reply.RCode = dnsmessage.RCodeNotImplemented
		return pack(reply, nil, nil)
	}
	q := questions[0]
	name, ok := hostName(q.Name.String())
	if !ok || q.Class != dnsmessage.ClassINET {
		reply.RCode = dnsmessage.RCodeNameError
		return pack(reply, &q, nil)
	}
	if q.Type != dnsmessage.TypeA && q.Type != dnsmessage.TypeAAAA {
		return pack(reply, &q, nil) // there may be others of the name
	}
	all, err := r.addresses(ctx, name)
	var dns *net.DNSError
	switch {
	case errors.As(err, &dns) && dns.IsNotFound || err == nil && len(all) == 0:
		reply.RCode = dnsmessage.RCodeNameError
	case err != nil:
		reply.RCode = dnsmessage.RCodeServerFailure
	}
	if !r.ipv6 {
		all = slices.DeleteFunc(all, netip.Addr.Is6)
	}
	return pack(reply, &q, all)
}

// hostName returns a name without its last dot, in lower case, if a host can
// have it.
func hostName(name string) (string, bool) {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	if name == "" || len(name) > 253 {
		return "", false
	}
	for i := range len(name) {
		if c := name[i]; !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.') {
			return "", false
		}
	}
	return name, !strings.Contains(name, "..")
}

// addresses returns the addresses of a name that may be reached, as the guest
// has to call them, and remembers whose they are. With none, but others, the
// refusal is kept.
func (r *resolver) addresses(ctx context.Context, name string) ([]netip.Addr, error) {
	all := []netip.Addr{netip.IPv6Loopback(), loopback4}
	if name != HostName {
		ctx, cancel := context.WithTimeout(ctx, lookupPatience)
		defer cancel()
		var err error
		if all, err = r.lookup(ctx, name); err != nil {
			return nil, err
		}
	}
	var good []netip.Addr
	var refused error
	for _, a := range all {
		a = a.Unmap()
		if err := r.rule.CheckHost(name, a); err != nil {
			refused = err
			continue
		}
		if a = inGuest(a); !slices.Contains(good, a) {
			good = append(good, a)
		}
	}
	if len(good) == 0 && refused != nil {
		r.use.refuse(netip.AddrPort{}, name, reason(refused))
	}
	for _, a := range good {
		r.remember(a, name)
	}
	return good, nil
}

// inGuest is what the guest calls an address: the host's loopback is the gateway
// to it (onHost).
func inGuest(a netip.Addr) netip.Addr {
	switch {
	case !a.IsLoopback():
		return a
	case a.Is6():
		return gateway6
	}
	return gateway4
}

// remember keeps the name of an address, the last one first.
func (r *resolver) remember(a netip.Addr, name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	names, known := r.names[a]
	if !known && len(r.names) >= maxNames {
		return
	}
	names = slices.DeleteFunc(slices.Clone(names), func(n string) bool { return n == name })
	r.names[a] = append([]string{name}, names[:min(len(names), maxNamesOfAddr-1)]...)
}

// nameOf returns the name by which the guest found an address: the last one that
// is good, else the last one, else "".
func (r *resolver) nameOf(a netip.Addr, good func(string) bool) string {
	r.mu.Lock()
	names := r.names[a]
	r.mu.Unlock()
	for _, name := range names {
		if good(name) {
			return name
		}
	}
	if len(names) > 0 {
		return names[0]
	}
	return ""
}

// pack makes an answer; of the addresses those that were asked for.
func pack(head dnsmessage.Header, q *dnsmessage.Question, all []netip.Addr) []byte {
	m := dnsmessage.Message{Header: head}
	if q != nil {
		m.Questions = []dnsmessage.Question{*q}
	}
	for _, a := range all {
		if len(m.Answers) == maxAnswers {
			break
		}
		h := dnsmessage.ResourceHeader{Name: q.Name, Class: dnsmessage.ClassINET, TTL: answerTTL}
		switch {
		case q.Type == dnsmessage.TypeA && a.Is4():
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AResource{A: a.As4()}})
		case q.Type == dnsmessage.TypeAAAA && a.Is6():
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AAAAResource{AAAA: a.As16()}})
		}
	}
	b, err := m.Pack()
	if err != nil || len(b) > maxUDP {
		return nil
	}
	return b
}
