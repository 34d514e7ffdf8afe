package server

import (
	"fmt"

	"nbd/nixproto"
	"nbd/server/adminapi"
	"nbd/store"
	"nbd/vm/egress"
	"nbd/vm/usernet"
)

// The network of builds of fixed outputs. Nobody else's build has one. What it
// reaches is decided by the settings of the request that started the run, so a
// run by a rule of the account's is not joined by other accounts, and one that
// reached what is not public answers no other account.

// noNetwork is told when a fixed output fails on a server without a network.
const noNetwork = "this server gives builds no network, those of fixed outputs included (its operator set network to false)"

// ruleOf returns what an account's builds and caches may reach beside public
// addresses. Items were checked when they were set; one that is none allows
// nothing.
func ruleOf(list []string) egress.Rule {
	rule, err := egress.ParseRule(list)
	if err != nil {
		return egress.Rule{}
	}
	return rule
}

// networkFor returns the network of a build, nil if it has none.
func (b *Builds) networkFor(j *job) *usernet.Config {
	if b.cfg.Network == nil || !fixedOutput(j.drv) {
		return nil
	}
	c := *b.cfg.Network
	c.Rule = ruleOf(j.set.reach)
	return &c
}

// scope is that of the job's flights.
func (j *job) scope() uint64 {
	if len(j.set.reach) > 0 && fixedOutput(j.drv) {
		return uint64(j.account)
	}
	return j.set.scope(j.account)
}

func fixedOutput(drv *nixproto.Derivation) bool {
	kind, err := drv.Kind()
	return err == nil && kind == nixproto.FixedOutput
}

// tellNetwork tells who waits what a build was not connected to, or why it
// failed without a network.
func (b *Builds) tellNetwork(f *flight, j *job, use *usernet.Use, failed bool) {
	if failed && b.cfg.Network == nil && fixedOutput(j.drv) {
		f.Tell(flightEvent{note: fmt.Sprintf("'%s': %s", j.drvPath, noNetwork)})
	}
	if use == nil {
		return
	}
	for _, r := range use.Refusals {
		f.Tell(flightEvent{note: fmt.Sprintf("'%s' was not connected to %s", j.drvPath, r)})
	}
}

// recordNetwork is what is kept of a build's use of its network.
func recordNetwork(use *usernet.Use) *store.BuildNetwork {
	if use == nil {
		return nil
	}
	n := &store.BuildNetwork{Sent: use.Sent, Received: use.Received, Private: use.Private, MoreHosts: use.MoreHosts}
	for _, h := range use.Hosts {
		n.Hosts = append(n.Hosts, store.BuildHost{Name: h.Name, Address: h.Address.String(), Sent: h.Sent, Received: h.Received})
	}
	for _, r := range use.Refusals {
		n.Refused = append(n.Refused, r.String())
	}
	return n
}

// tellableNetwork is what the owner of a build and the operator are shown of its
// network.
func tellableNetwork(n *store.BuildNetwork) *adminapi.Network {
	if n == nil {
		return nil
	}
	// Lists in JSON, also empty ones.
	t := &adminapi.Network{Sent: n.Sent, Received: n.Received, Hosts: []adminapi.Host{}, More: n.MoreHosts, Refused: append([]string{}, n.Refused...), Private: n.Private}
	for _, h := range n.Hosts {
		t.Hosts = append(t.Hosts, adminapi.Host(h))
	}
	return t
}
