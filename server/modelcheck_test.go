package server

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"nbd/nixproto"
	"nbd/reuse"
	"nbd/store"
)

// record is the last record of a request.
func (m *modelTest) record(p *pending) *store.Build {
	all := m.requestsOf(p.who.ID)
	for i, b := range all {
		if b.ID != p.id {
			continue
		}
		for b.RestartedAs != 0 { // it was retried
			i = slices.IndexFunc(all, func(o store.Build) bool { return o.ID == b.RestartedAs })
			b = all[i]
		}
		return &all[i]
	}
	m.t.Fatalf("step %d: no record %d of %s", m.step, p.id, p.who.Name)
	return nil
}

// checkRecord compares the record of a request that was not a run's, or that
// left, with what was to be decided.
func (m *modelTest) checkRecord(p *pending, status string) *store.Build {
	m.t.Helper()
	b := m.record(p)
	check := ""
	for _, d := range b.Decisions {
		if d.Taken {
			check = d.Check
		}
	}
	want := p.verdict.by
	if want == "refused" || want == "limit" {
		want = ""
	}
	if b.Status != status || check != want {
		m.t.Errorf("step %d: request of %s by %s: %s by %q (%+v), want %s by %q", m.step, p.drv.drv.Name, p.who.Name, b.Status, check, b.Decisions, status, want)
	}
	return b
}

// checkAnswered compares an answer that needed no run.
func (m *modelTest) checkAnswered(p *pending, r *nixproto.BuildResult) {
	m.t.Helper()
	all := m.requestsOf(p.who.ID)
	p.id = all[len(all)-1].ID
	wants := map[string]struct {
		status string
		code   func(nixproto.BuildStatus) bool
	}{
		"refused": {store.StatusClientError, func(s nixproto.BuildStatus) bool { return s == nixproto.MiscFailure }},
		"limit":   {store.StatusClientError, func(s nixproto.BuildStatus) bool { return s == nixproto.MiscFailure }},
		"outputs": {store.StatusBuilt, func(s nixproto.BuildStatus) bool { return s == nixproto.AlreadyValid }},
		"success": {store.StatusBuilt, func(s nixproto.BuildStatus) bool { return s == nixproto.Built }},
		"failure": {store.StatusBuildFailed, func(s nixproto.BuildStatus) bool {
			return s == nixproto.PermanentFailure || s == nixproto.OutputRejected
		}},
		"timeout": {store.StatusTimeout, func(s nixproto.BuildStatus) bool { return s == nixproto.TimedOut }},
	}
	want := wants[p.verdict.by]
	if r == nil || !want.code(r.Status) {
		m.t.Fatalf("step %d: %s by %s: %+v, want %s", m.step, p.drv.drv.Name, p.who.Name, r, p.verdict.by)
	}
	b := m.checkRecord(p, want.status)
	end := p.verdict.end
	log := ""
	var from store.BuildID
	if end != nil {
		if end.outs == nil {
			log = end.log
		} else {
			m.grant(p.ask, end)
		}
		if end.account == p.who.ID {
			from = end.build
		}
	}
	if got := p.sink.log(p.drv.path); got != log {
		m.t.Errorf("step %d: log %q, want %q", m.step, got, log)
	}
	if b.ReusedFrom != from || !b.Reused || b.CPUSeconds != 0 {
		m.t.Errorf("step %d: record %+v, want it reused from %d", m.step, b, from)
	}
	if said := r.Error + fmt.Sprint(p.sink.notes); end != nil && (strings.Contains(said, "of build ") || strings.Contains(said, "from build ")) != (from != 0) {
		m.t.Errorf("step %d: said %q, of build %d", m.step, said, from)
	}
}

// checkLimited compares the answer of a request that passed its own limit.
func (m *modelTest) checkLimited(p *pending, r *nixproto.BuildResult) {
	m.t.Helper()
	if r == nil || r.Status != nixproto.TimedOut {
		m.t.Fatalf("step %d: %s by %s: %+v, want a timeout", m.step, p.drv.drv.Name, p.who.Name, r)
	}
	f := p.flight
	alone := len(f.waiters) == 1
	f.waiters = slices.DeleteFunc(f.waiters, func(o *pending) bool { return o == p })
	if !alone {
		return
	}
	m.flights = slices.DeleteFunc(m.flights, func(o *modelFlight) bool { return o == f })
	m.settleDown()
	all := m.requestsOf(p.who.ID)
	p.id = all[len(all)-1].ID
	b := m.checkRecord(p, store.StatusTimeout)
	if len(f.script.logs) != 1 {
		m.t.Fatalf("step %d: a build that passed a limit ran %d times", m.step, len(f.script.logs))
	}
	end := &knownEnd{account: p.who.ID, build: b.ID, log: f.script.logs[0]}
	m.timedOut(p.ask, end, func(own store.AccountID) bool {
		ends, err := m.st.Ends(m.t.Context(), m.realKey(b), own)
		m.must(err)
		return ends.Timeouts[p.policy.limited].Build == b.ID
	})
}

func (m *modelTest) realKey(b *store.Build) [32]byte {
	key, err := reuse.ParseKey(b.Key)
	m.must(err)
	return key
}

// compare compares all own views, and what one account may use, with the rules.
func (m *modelTest) compare() {
	m.t.Helper()
	if m.t.Failed() {
		return
	}
	check := func(whose string, p nixproto.StorePath, want *content, got *nixproto.PathInfo, err error) {
		m.t.Helper()
		switch {
		case want == nil && errors.Is(err, store.ErrNotFound):
		case want == nil || err != nil:
			m.t.Errorf("step %d: %s has %+v for %s, %v; want %+v", m.step, whose, got, p, err, want)
		case got.NarHash != want.hash || !slices.Equal(got.References, want.refs) || !m.signedBy(got, want.by):
			m.t.Errorf("step %d: %s has %+v for %s, want %+v", m.step, whose, got, p, want)
		}
	}
	for _, id := range m.ids() {
		all, err := m.st.All(m.t.Context(), id)
		m.must(err)
		if want := slices.Sorted(maps.Keys(m.members[id].own)); !slices.Equal(all, want) {
			m.t.Errorf("step %d: %s has %q, want %q", m.step, m.members[id].Name, all, want)
		}
		for _, p := range all {
			info, err := m.st.Info(m.t.Context(), id, p)
			check(m.members[id].Name, p, m.members[id].own[p], info, err)
		}
	}
	a := m.pick()
	sight := m.sight(a)
	for _, p := range m.allPaths() {
		info, err := sight.Info(m.t.Context(), p)
		check("a session of "+a.Name, p, m.usable(a, p), info, err)
	}
}

// signedBy reports whether a record has signatures of just those keys that
// somebody has, and all of them true.
func (m *modelTest) signedBy(info *nixproto.PathInfo, by map[string]bool) bool {
	for _, sig := range info.Signatures {
		name := keyName(sig)
		if !by[name] {
			return false
		}
		if public := m.public(name); public != "" {
			k, err := nixproto.ParsePublicKey(public)
			m.must(err)
			if !k.Verify(info.Fingerprint(), sig) {
				return false
			}
		}
	}
	n := 0
	for _, yes := range by {
		if yes {
			n++
		}
	}
	return len(info.Signatures) == n
}
