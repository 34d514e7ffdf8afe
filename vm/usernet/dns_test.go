package usernet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
)

// query is a question for the addresses of a name.
func query(t testing.TB, name string, kind dnsmessage.Type) []byte {
	t.Helper()
	m := dnsmessage.Message{Header: dnsmessage.Header{ID: 7, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: kind, Class: dnsmessage.ClassINET}}}
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// answered parses an answer into its code and addresses.
func answered(t testing.TB, b []byte) string {
	t.Helper()
	var m dnsmessage.Message
	if err := m.Unpack(b); err != nil || !m.Response || m.ID != 7 {
		t.Fatalf("answer %x: %v", b, err)
	}
	words := []string{strings.TrimPrefix(m.RCode.String(), "RCode")}
	for _, a := range m.Answers {
		switch body := a.Body.(type) {
		case *dnsmessage.AResource:
			words = append(words, netip.AddrFrom4(body.A).String())
		case *dnsmessage.AAAAResource:
			words = append(words, netip.AddrFrom16(body.AAAA).String())
		}
	}
	return strings.Join(words, " ")
}

// names is a lookup that knows some names.
func names(known map[string]string) func(context.Context, string) ([]netip.Addr, error) {
	return func(_ context.Context, name string) (all []netip.Addr, err error) {
		list, ok := known[name]
		if !ok {
			return nil, &net.DNSError{Err: "no such host", Name: name, IsNotFound: true}
		}
		if list == "broken" {
			return nil, errors.New("the name server does not answer")
		}
		for word := range strings.FieldsSeq(list) {
			all = append(all, netip.MustParseAddr(word))
		}
		return all, nil
	}
}

func TestAnswer(t *testing.T) {
	many := make([]string, 100)
	for i := range many {
		many[i] = fmt.Sprintf("8.1.1.%d", i)
	}
	known := names(map[string]string{
		"two.example": "8.8.8.8 2a01:4f8::8", "one.example": "8.8.4.4", "private.example": "10.0.0.1 192.168.0.1",
		"mixed.example": "10.0.0.1 8.8.8.8 169.254.169.254", "listed.lan": "10.7.7.7", "other.lan": "10.7.7.8", "local.lan": "127.0.0.1 ::1",
		"mapped.example": "::ffff:10.0.0.1 64:ff9b::7f00:1", "broken.example": "broken", "many.example": strings.Join(many, " "), "empty.example": "",
	})
	cfg := Config{Rule: rule(t, "listed.lan:8080", "10.7.7.8:443", "local.lan"), lookup: known}
	for _, ipv6 := range []bool{false, true} {
		u := newUse(0)
		r := newResolver(cfg, ipv6, u)
		for _, test := range []struct {
			name string
			kind dnsmessage.Type
			want string
		}{
			{"two.example.", dnsmessage.TypeA, "Success 8.8.8.8"},
			{"TWO.Example.", dnsmessage.TypeA, "Success 8.8.8.8"},
			{"two.example.", dnsmessage.TypeAAAA, map[bool]string{false: "Success", true: "Success 2a01:4f8::8"}[ipv6]},
			{"one.example.", dnsmessage.TypeAAAA, "Success"},
			{"two.example.", dnsmessage.TypeMX, "Success"},
			{"none.example.", dnsmessage.TypeA, "NameError"},
			{"empty.example.", dnsmessage.TypeA, "NameError"},
			{"broken.example.", dnsmessage.TypeA, "ServerFailure"},
			{"private.example.", dnsmessage.TypeA, "NameError"},
			{"mapped.example.", dnsmessage.TypeAAAA, "NameError"},
			{"mixed.example.", dnsmessage.TypeA, "Success 8.8.8.8"},
			{"listed.lan.", dnsmessage.TypeA, "Success 10.7.7.7"},
			{"other.lan.", dnsmessage.TypeA, "Success 10.7.7.8"},
			{"local.lan.", dnsmessage.TypeA, "Success 192.0.0.1"},
			{"host.nbd.internal.", dnsmessage.TypeA, "NameError"},
			{"many.example.", dnsmessage.TypeA, "Success " + strings.Join(many[:maxAnswers], " ")},
			{"a b.example.", dnsmessage.TypeA, "NameError"},
			{"..", dnsmessage.TypeA, ""},
			{".", dnsmessage.TypeA, "NameError"},
		} {
			if test.want == "" {
				continue // no message can hold it
			}
			if got := answered(t, r.answer(t.Context(), query(t, test.name, test.kind))); got != test.want {
				t.Errorf("%s %s: %s, want %s", test.name, test.kind, got, test.want)
			}
		}
		var refused []string
		for _, x := range u.get().Refusals {
			refused = append(refused, x.Name)
		}
		if !slices.Equal(refused, []string{"private.example", "mapped.example", "host.nbd.internal"}) {
			t.Errorf("refused %q", refused)
		}
	}
}

// The longest answer to the longest name is not too long.
func TestLongAnswer(t *testing.T) {
	label := strings.Repeat("a", 63)
	name := strings.Join([]string{label, label, label, label[:61]}, ".")
	var all []string
	for i := range 100 {
		all = append(all, fmt.Sprintf("2a01:4f8:1111:2222:3333:4444:5555:%d", 1000+i))
	}
	r := newResolver(Config{lookup: names(map[string]string{name: strings.Join(all, " ")})}, true, newUse(0))
	b := r.answer(t.Context(), query(t, name+".", dnsmessage.TypeAAAA))
	if got, want := answered(t, b), "Success "+strings.Join(all[:maxAnswers], " "); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// The host's own name is that of what is listed of its loopback: a guest that
// takes the first address does not meet one that is refused.
func TestHostName(t *testing.T) {
	for _, test := range []struct{ listed, a, aaaa string }{
		{"127.0.0.1:8080", "Success 192.0.0.1", "Success"},
		{"[::1]:8080", "Success", "Success fd6e:6264::1"},
		{"127.0.0.0/8 ::1", "Success 192.0.0.1", "Success fd6e:6264::1"},
		{HostName + ":80", "Success 192.0.0.1", "Success fd6e:6264::1"},
		{"10.0.0.1", "NameError", "NameError"},
	} {
		r := newResolver(Config{Rule: rule(t, strings.Fields(test.listed)...)}, true, newUse(0))
		for kind, want := range map[dnsmessage.Type]string{dnsmessage.TypeA: test.a, dnsmessage.TypeAAAA: test.aaaa} {
			if got := answered(t, r.answer(t.Context(), query(t, HostName+".", kind))); got != want {
				t.Errorf("%s, %s: %s, want %s", test.listed, kind, got, want)
			}
		}
	}
}

// Names are asked for at the gateway, and what is connected to is known by its
// name. An address counts when it is connected to, whatever a name was for.
func TestNames(t *testing.T) {
	at := server(t, echo)
	answers := atomic.Pointer[string]{}
	answers.Store(new("127.0.0.1"))
	cfg := Config{Rule: rule(t, "cache.lan:"+fmt.Sprint(at.Port())), Ports: []uint16{80}, lookup: func(ctx context.Context, name string) ([]netip.Addr, error) {
		return names(map[string]string{"cache.lan": "127.0.0.1", "evil.example": *answers.Load()})(ctx, name)
	}}
	g := newGuest(t, cfg)
	lookup := func(name string) []string {
		to := fullAddress(netip.AddrPortFrom(gateway4, portDNS))
		resolver := &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
			return gonet.DialUDP(g.stack, nil, &to, ipv4.ProtocolNumber)
		}}
		all, err := resolver.LookupHost(t.Context(), name+".")
		if err != nil {
			return []string{"no"}
		}
		return all
	}
	// Nobody has asked for a name that is listed.
	if _, err := g.dial(gatewayPort(at)); !isReset(err) {
		t.Errorf("without a name: %v", err)
	}
	if got := lookup("evil.example"); got[0] != "no" {
		t.Errorf("evil.example is %q", got)
	}
	if got := lookup("cache.lan"); !slices.Equal(got, []string{gateway4.String()}) {
		t.Errorf("cache.lan is %q", got)
	}
	c, err := g.dial(gatewayPort(at))
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	// A name that is public first, and then is not, gains nothing.
	answers.Store(new("8.8.8.8"))
	if got := lookup("evil.example"); !slices.Equal(got, []string{"8.8.8.8"}) {
		t.Errorf("evil.example is %q", got)
	}
	answers.Store(new("10.0.0.1"))
	if got := lookup("evil.example"); got[0] != "no" {
		t.Errorf("evil.example is %q", got)
	}
	if _, err := g.dial(netip.MustParseAddrPort("10.0.0.1:80")); !isReset(err) {
		t.Errorf("after rebinding: %v", err)
	}
	u := g.net.Use()
	if len(u.Hosts) != 1 || u.Hosts[0].Name != "cache.lan" || !u.Private {
		t.Errorf("use is %+v", u)
	}
}

// However many questions come, and however long their answers take, few run at
// once, and the end of the network ends them.
func TestLookupFlood(t *testing.T) {
	var running, most atomic.Int32
	full := make(chan struct{}, maxLookups)
	n, conn := linked(t, Config{lookup: func(ctx context.Context, _ string) ([]netip.Addr, error) {
		most.Store(max(most.Load(), running.Add(1)))
		full <- struct{}{}
		<-ctx.Done()
		running.Add(-1)
		return nil, ctx.Err()
	}})
	go discard(conn)
	for i := range 20 * maxLookups {
		ask := udpFrom(guest4, gateway4, 5000, portDNS, query(t, fmt.Sprintf("n%d.example.", i), dnsmessage.TypeA))
		if err := writeFrame(conn, etherIPv4, ask); err != nil {
			t.Fatal(err)
		}
	}
	for range maxLookups {
		<-full
	}
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	if running.Load() != 0 || most.Load() > maxLookups {
		t.Errorf("%d lookups run, %d did at most", running.Load(), most.Load())
	}
}

// The names that are remembered are bounded.
func TestNamesAreBounded(t *testing.T) {
	r := newResolver(Config{}, false, newUse(0))
	for i := range maxNames + 100 {
		r.remember(netip.AddrFrom4([4]byte{8, 8, byte(i >> 8), byte(i)}), "x.example")
	}
	a := netip.AddrFrom4([4]byte{8, 8, 0, 0})
	for i := range 100 {
		r.remember(a, fmt.Sprintf("n%d.example", i))
	}
	if len(r.names) != maxNames || len(r.names[a]) != maxNamesOfAddr || r.nameOf(a, func(string) bool { return false }) != "n99.example" {
		t.Errorf("%d addresses, names %q", len(r.names), r.names[a])
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add(query(f, "two.example.", dnsmessage.TypeA))
	f.Add(query(f, "host.nbd.internal.", dnsmessage.TypeAAAA))
	f.Add([]byte{})
	r := newResolver(Config{lookup: names(map[string]string{"two.example": "8.8.8.8 2a01:4f8::8"})}, true, newUse(0))
	f.Fuzz(func(t *testing.T, b []byte) {
		answer := r.answer(context.Background(), b)
		if answer == nil {
			return
		}
		var m dnsmessage.Message
		if err := m.Unpack(answer); err != nil || !m.Response || len(answer) > maxUDP {
			t.Errorf("answer %x to %x: %v", answer, b, err)
		}
	})
}
