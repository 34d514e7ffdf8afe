package server

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"nbd/nixproto"
	"nbd/store"
	"nbd/vm"
	"nbd/vm/usernet"
)

// withNetwork gives builds a network.
func withNetwork(c *BuildsConfig) { c.Network = &usernet.Config{Ports: []uint16{80}, Rate: 1000} }

// fetched is a request for a fixed output with that content.
func fetched(bt *buildTest, content string) *BuildRequest {
	return bt.request(fixedDrv(bt.t, "x", "sha256", nixproto.SumSHA256([]byte(content))))
}

// Fixed outputs have a network, by the rule of the account's settings, and
// nobody else has one.
func TestNetworkIsForFixedOutputs(t *testing.T) {
	bt := newBuildTest(t, withNetwork)
	alice, bob := bt.alice(), bt.party("bob")
	bob.set("allow-addresses", "10.1.0.0/16 cache.lan:8080")
	private := netip.MustParseAddrPort("10.1.2.3:80")
	var got []*usernet.Config
	bt.runner.act("x", func(f *fakeRun) error {
		got = append(got, f.spec.Network)
		return f.write("out", "x", false)
	})
	for _, p := range []*party{alice, bob} {
		p.set("reuse-results", "none")
		r, _ := p.build(fetched(bt, "x"))
		wantStatus(t, r, nixproto.Built)
	}
	r, _ := bob.build(bt.request(drv("x")))
	wantStatus(t, r, nixproto.Built)
	r, _ = bob.build(bt.request(floatingDrv("x")))
	wantStatus(t, r, nixproto.Built)
	if len(got) != 4 || got[0] == nil || got[1] == nil || got[2] != nil || got[3] != nil {
		t.Fatalf("networks %v", got)
	}
	if got[0].Rate != 1000 || got[0].Rule.Check("", private) == nil || got[1].Rule.Check("", private) != nil || got[1].Rule.ID() == "" {
		t.Errorf("networks %+v, %+v", got[0], got[1])
	}
}

// What a build did with its network is kept and shown, and who waits is told
// what was refused, outside the log.
func TestNetworkIsTold(t *testing.T) {
	bt := newBuildTest(t, withNetwork)
	at := netip.MustParseAddrPort("8.8.8.8:80")
	use := usernet.Use{Sent: 10, Received: 20, MoreHosts: 3, Hosts: []usernet.Host{{Name: "dns.example", Address: at, Sent: 10, Received: 20}},
		Refusals: []usernet.Refusal{{Address: netip.MustParseAddrPort("10.0.0.1:80"), Why: "it is a private address"}}}
	bt.runner.act("x", func(f *fakeRun) error {
		f.say("fetching")
		return &vm.BuildError{Kind: vm.Failed, ExitStatus: 1, Result: vm.Result{Start: time.Unix(1000, 0), Network: &use}}
	})
	req := fetched(bt, "x")
	r, sink := bt.build(req)
	wantStatus(t, r, nixproto.TransientFailure)
	if got := strings.Join(sink.notes, "\n"); !strings.Contains(got, "was not connected to 10.0.0.1:80: it is a private address") || sink.log(req.DrvPath) != "fetching\n" {
		t.Errorf("notes %q, log %q", sink.notes, sink.log(req.DrvPath))
	}
	n := bt.records()[0].Network
	want := store.BuildNetwork{Sent: 10, Received: 20, MoreHosts: 3, Hosts: []store.BuildHost{{Name: "dns.example", Address: "8.8.8.8:80", Sent: 10, Received: 20}},
		Refused: []string{"10.0.0.1:80: it is a private address"}}
	if n == nil || fmt.Sprintf("%+v", *n) != fmt.Sprintf("%+v", want) {
		t.Errorf("record %+v", n)
	}
	var text strings.Builder
	for _, row := range tellableNetwork(n).Rows() {
		fmt.Fprintf(&text, "%s: %s\n", row[0], row[1])
	}
	if got := text.String(); got != "network: 10 bytes sent, 20 received\nconnected: dns.example (8.8.8.8:80): 10 bytes sent, 20 received\n"+
		"connected: 3 times more\nrefused: 10.0.0.1:80: it is a private address\n" {
		t.Errorf("shown as\n%s", got)
	}
}

// Without a network a fixed output that fails is told why.
func TestNetworkIsOff(t *testing.T) {
	bt := newBuildTest(t, nil)
	bt.runner.act("x", func(f *fakeRun) error {
		if f.spec.Network != nil {
			t.Error("there is a network")
		}
		return &vm.BuildError{Kind: vm.Failed, ExitStatus: 1}
	})
	_, sink := bt.build(fetched(bt, "x"))
	if got := fmt.Sprint(sink.notes); !strings.Contains(got, noNetwork) {
		t.Errorf("notes %q", got)
	}
	_, sink = bt.build(bt.request(drv("x")))
	if got := fmt.Sprint(sink.notes); strings.Contains(got, noNetwork) {
		t.Errorf("notes %q", got)
	}
}

// A run that reached what is not public answers nobody else; its own account it
// does. One that reached public addresses only answers all, also if more was
// listed.
func TestNetworkPrivateIsNotShared(t *testing.T) {
	for _, private := range []bool{true, false} {
		bt := newBuildTest(t, withNetwork)
		alice, bob := bt.alice(), bt.party("bob")
		alice.set("allow-addresses", "10.0.0.0/8")
		bt.runner.act("x", func(f *fakeRun) error {
			f.result.Network = &usernet.Use{Private: private}
			return f.write("out", "x", false)
		})
		req := fetched(bt, "x")
		r, _ := alice.build(req)
		wantStatus(t, r, nixproto.Built)
		alice.forget(req)
		r, _ = alice.build(req)
		wantStatus(t, r, nixproto.Built)
		bt.wantRuns(1)
		r, _ = bob.build(req)
		wantStatus(t, r, nixproto.Built)
		if private {
			bt.wantRuns(2)
		} else {
			bt.wantRuns(1)
		}
	}
}

// While a run may reach more than is public, other accounts do not wait for it.
func TestNetworkPrivateIsNotJoined(t *testing.T) {
	bt := newBuildTest(t, withNetwork)
	alice, bob := bt.alice(), bt.party("bob")
	alice.set("allow-addresses", "10.0.0.0/8")
	open := make(chan struct{})
	bt.runner.act("x", func(f *fakeRun) error {
		f.say("run %d", f.try)
		select {
		case <-open:
		case <-time.After(patience):
			return errors.New("nobody opened")
		}
		return f.write("out", "x", false)
	})
	req := fetched(bt, "x")
	_, first, _ := alice.start(req)
	_, second, _ := bob.start(req)
	close(open)
	wantStatus(t, <-first, nixproto.Built)
	wantStatus(t, <-second, nixproto.Built)
	bt.wantRuns(2)
}

// Nothing of a fixed output that did not succeed is ever reused, not even that
// it took too long.
func TestNetworkTimeoutIsNotReused(t *testing.T) {
	bt := newBuildTest(t, withNetwork)
	bt.runner.act("x", func(f *fakeRun) error {
		f.say("run %d", f.try)
		return &vm.BuildError{Kind: vm.TimedOut}
	})
	p := bt.alice().with("NBD_REUSE_BUILD_TIMEOUTS", "true", "NBD_TIMEOUT", "1")
	for range 2 {
		r, _ := p.build(fetched(bt, "x"))
		wantStatus(t, r, nixproto.TimedOut)
	}
	bt.wantRuns(2)
}
