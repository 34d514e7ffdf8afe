package server

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"nbd/nixproto"
	"nbd/store"
)

// This file tells product.md 4 and 5 a second time, in memory and in the order
// in which they are written there. It knows nothing of how they are carried
// out: model_test.go compares the two.

// A world is what the rules say there is.
type world struct {
	members map[store.AccountID]*member
	ends    map[slot]*knownEnds
	// bytes are the contents that are stored; what no view has may go.
	bytes      map[nixproto.Hash]bool
	flights    []*modelFlight // under way
	generation string
	emulated   bool
}

// A member is an account: its own view and its wishes.
type member struct {
	store.Account
	own            map[nixproto.StorePath]*content
	links          map[store.AccountID]bool // one side's wish
	trusts, offers map[string]bool          // names of keys
	share, noHours bool
	policy         askPolicy
}

// A content is what a view has for a path.
type content struct {
	hash nixproto.Hash
	refs []nixproto.StorePath
	by   map[string]bool // names of the keys that signed it
}

// An askPolicy is what the settings of one request say.
type askPolicy struct {
	reuse              string // all, own, none
	failures, timeouts bool
	keep               bool
	restarts           int
	limited            string // the kind of a limit that a build that hangs passes; "" for none
	patient            bool   // limits that no run passes are set
}

// An ask is one request of a build.
type ask struct {
	who     *member
	policy  askPolicy
	drv     *modelDrv
	rebuild bool // --check
	key     string
	own     bool // uses and is used by nobody else
}

// A modelDrv is what can be built.
type modelDrv struct {
	drv    *nixproto.Derivation
	path   nixproto.StorePath
	inputs []nixproto.StorePath
	outs   map[string]nixproto.StorePath
	fixed  bool
}

// A slot is where ends are kept: under a key for everybody, or for one account.
type slot struct {
	key string
	own store.AccountID
}

// knownEnds are the ends in a slot: the first success, the last failure of each
// generation, a timeout of each kind.
type knownEnds struct {
	success  *knownEnd
	failures map[string]*knownEnd
	timeouts map[string]*knownEnd
}

// A knownEnd is how a run ended.
type knownEnd struct {
	account store.AccountID
	build   store.BuildID // its record
	log     string
	outs    map[string]*content // of a success
}

// A modelFlight is a build under way, and who waits for it.
type modelFlight struct {
	scope   store.AccountID
	key     string
	waiters []*pending
	script  *script
	alone   bool // nobody can join
}

// A verdict is how a request must be answered: by which check, with what.
type verdict struct {
	by     string // refused, limit, outputs, success, failure, timeout, running, run
	end    *knownEnd
	flight *modelFlight
}

func (w *world) ids() []store.AccountID { return slices.Sorted(maps.Keys(w.members)) }

// linked: trust between accounts exists only when both sides said so.
func (w *world) linked(a, b *member) bool { return a != b && a.links[b.ID] && b.links[a.ID] }

// usable is what an account may use for a path (product.md 4); nil if nothing.
func (w *world) usable(a *member, p nixproto.StorePath) *content {
	if c := a.own[p]; c != nil { // 1: what it brought or built itself
		return c
	}
	var candidates []*content
	for _, id := range w.ids() { // 2: what a linked account may use by 1
		if b := w.members[id]; w.linked(a, b) && b.own[p] != nil {
			candidates = append(candidates, b.own[p])
		}
	}
	signed := func(b *member, open func(key string) bool) {
		c := b.own[p]
		if a == b || c == nil {
			return
		}
		lent := &content{c.hash, c.refs, map[string]bool{}}
		opens := false
		for key, yes := range c.by {
			lent.by[key] = yes && a.trusts[key]
			opens = opens || lent.by[key] && open(key)
		}
		if opens {
			candidates = append(candidates, lent)
		}
	}
	for _, id := range w.ids() { // 3: signed by a trusted key that is the operator's, or offered by the holder
		signed(w.members[id], func(key string) bool { return key == publicKeyName })
	}
	for _, id := range w.ids() {
		signed(w.members[id], func(key string) bool { return w.members[id].offers[key] })
	}
	for _, c := range candidates { // usable means with its whole closure
		if !slices.ContainsFunc(c.refs, func(r nixproto.StorePath) bool { return r != p && w.usable(a, r) == nil }) {
			return c
		}
	}
	return nil
}

// adopt: what an own path refers to is own, too.
func (w *world) adopt(a *member, p nixproto.StorePath) {
	if a.own[p] != nil {
		return
	}
	c := w.usable(a, p)
	for _, r := range c.refs {
		if r != p {
			w.adopt(a, r)
		}
	}
	a.own[p] = c
}

// enter puts content that an account brought, built or was granted into its
// view; what is there stays.
func (w *world) enter(a *member, p nixproto.StorePath, c *content) {
	w.bytes[c.hash] = true
	if a.own[p] != nil {
		return
	}
	for _, r := range c.refs {
		if r != p {
			w.adopt(a, r)
		}
	}
	a.own[p] = c
}

// grant gives the outputs of a success to an account, with its own signature.
func (w *world) grant(a *ask, end *knownEnd) {
	for name, c := range end.outs {
		mine := &content{c.hash, c.refs, map[string]bool{keyName(a.who.PublicKey): true}}
		w.enter(a.who, a.drv.outs[name], mine)
	}
}

// keyOf is the derivation and the content of the closure of its inputs, as the
// account sees them; "" if something is missing.
func (w *world) keyOf(a *ask) string {
	seen := map[nixproto.StorePath]*content{}
	todo := slices.Clone(a.drv.inputs)
	for len(todo) > 0 {
		p := todo[0]
		todo = todo[1:]
		if seen[p] != nil {
			continue
		}
		c := w.usable(a.who, p)
		if c == nil {
			return ""
		}
		seen[p] = c
		todo = append(todo, c.refs...)
	}
	var key strings.Builder
	key.WriteString(string(a.drv.path))
	for _, p := range slices.Sorted(maps.Keys(seen)) {
		fmt.Fprint(&key, " ", p, seen[p].hash, seen[p].refs)
	}
	return key.String()
}

// shares reports whether an account lets others use its ends; one that was
// removed does not.
func (w *world) shares(id store.AccountID) bool { return w.members[id] != nil && w.members[id].share }

// slots are where an ask finds ends, its own first.
func (w *world) slots(a *ask) (found []*knownEnds) {
	for _, s := range []slot{{a.key, a.who.ID}, {a.key, 0}} {
		if e := w.ends[s]; e != nil {
			found = append(found, e)
		}
	}
	return found
}

// mayUse: an end of its own, or one of another, if both share.
func (w *world) mayUse(a *ask, e *knownEnd) bool {
	return e != nil && (e.account == a.who.ID || !a.own && w.shares(e.account))
}

func (w *world) here(outs map[string]*content) bool {
	for _, c := range outs {
		if !w.bytes[c.hash] {
			return false
		}
	}
	return true
}

// decide answers a request by the order of checks of product.md 5.
func (w *world) decide(a *ask) verdict {
	a.own = !a.who.share || a.policy.reuse == "own"
	missing := slices.ContainsFunc(slices.Collect(maps.Values(a.drv.outs)), func(p nixproto.StorePath) bool { return w.usable(a.who, p) == nil })
	if !a.rebuild && !missing {
		return verdict{by: "outputs"}
	}
	if a.rebuild && missing {
		return verdict{by: "refused"}
	}
	if a.key = w.keyOf(a); a.key == "" {
		return verdict{by: "refused"}
	}
	alone := a.rebuild || a.policy.reuse == "none"
	if !alone {
		if v := w.decideStored(a); v.by != "" {
			return v
		}
		for _, f := range w.flights {
			if !f.alone && f.key == a.key && f.scope == a.scope() {
				return verdict{by: "running", flight: f}
			}
		}
	}
	if a.who.noHours {
		return verdict{by: "limit"}
	}
	return verdict{by: "run", flight: &modelFlight{scope: a.scope(), key: a.key, alone: alone}}
}

// scope is who may wait for the same run: all, or one account.
func (a *ask) scope() store.AccountID {
	if a.own {
		return a.who.ID
	}
	return 0
}

// decideStored looks for an end that stands in for a run.
func (w *world) decideStored(a *ask) verdict {
	slots := w.slots(a)
	for _, s := range slots {
		if w.mayUse(a, s.success) && w.here(s.success.outs) {
			return verdict{by: "success", end: s.success}
		}
	}
	failed := false
	for _, s := range slots {
		e := s.failures[w.generation]
		if a.drv.fixed || !w.mayUse(a, e) {
			continue
		}
		if failed = true; a.policy.failures {
			return verdict{by: "failure", end: e}
		}
	}
	if failed || !a.policy.timeouts { // a failure says more than a timeout
		return verdict{}
	}
	for _, s := range slots {
		for _, kind := range []string{store.TimeoutRun, store.TimeoutSilent} {
			// It ran longer than the limit that ended it, and not as long as a
			// patient one's.
			if e := s.timeouts[kind]; w.mayUse(a, e) && a.policy.limited == kind {
				return verdict{by: "timeout", end: e}
			}
		}
	}
	return verdict{}
}

// store keeps the end of a run that may stand in for others.
func (w *world) store(a *ask, change func(own store.AccountID, k *knownEnds)) {
	if a.rebuild {
		return
	}
	if a.who.share {
		change(0, w.slot(slot{a.key, 0}))
	}
	if a.own {
		change(a.who.ID, w.slot(slot{a.key, a.who.ID}))
	}
}

func (w *world) slot(s slot) *knownEnds {
	if w.ends[s] == nil {
		w.ends[s] = &knownEnds{failures: map[string]*knownEnd{}, timeouts: map[string]*knownEnd{}}
	}
	return w.ends[s]
}

// succeeded, failed and timedOut keep what a run of a's was.
func (w *world) succeeded(a *ask, e *knownEnd) {
	for _, c := range e.outs {
		w.bytes[c.hash] = true
	}
	w.store(a, func(_ store.AccountID, k *knownEnds) {
		// The first one stays, if it is of use to others.
		old := k.success
		if old == nil || !w.here(old.outs) || old.account != e.account && !w.shares(old.account) {
			k.success = e
		}
	})
}

func (w *world) failed(a *ask, e *knownEnd) {
	if !a.drv.fixed {
		w.store(a, func(_ store.AccountID, k *knownEnds) { k.failures[w.generation] = e })
	}
}

// timedOut keeps a timeout, where it is the longest.
func (w *world) timedOut(a *ask, e *knownEnd, longest func(own store.AccountID) bool) {
	if a.drv.fixed { // the network may have made it wait
		return
	}
	w.store(a, func(own store.AccountID, k *knownEnds) {
		if longest(own) {
			k.timeouts[a.policy.limited] = e
		}
	})
}

// sweep: what no view has goes.
func (w *world) sweep() {
	clear(w.bytes)
	for _, m := range w.members {
		for _, c := range m.own {
			w.bytes[c.hash] = true
		}
	}
}

func keyName(public string) string {
	name, _, _ := strings.Cut(public, ":")
	return name
}
