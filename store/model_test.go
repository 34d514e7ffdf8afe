package store_test

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nbd/nixproto"
	"nbd/store"
	"nbd/store/storetest"
)

// A model is what a store should know: for each account its paths.
type model struct {
	t     *testing.T
	rng   *rand.Rand
	dir   string
	s     *store.Store
	views map[store.AccountID]map[nixproto.StorePath]*nixproto.PathInfo
	nars  map[nixproto.Hash][]byte
	names int
}

// TestModel does random things to a store and to maps, and compares them.
func TestModel(t *testing.T) {
	steps := 1500
	if testing.Short() {
		steps = 300
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	m := &model{
		t: t, rng: rand.New(rand.NewPCG(seed, 0)), dir: t.TempDir(),
		views: make(map[store.AccountID]map[nixproto.StorePath]*nixproto.PathInfo),
		nars:  make(map[nixproto.Hash][]byte),
	}
	m.open()
	for range 3 {
		m.addAccount()
	}
	actions := []func(){m.upload, m.upload, m.upload, m.upload, m.register, m.delete, m.delete, m.gc, m.sweep, m.reopen, m.sign, m.account, m.compare}
	for range steps {
		// Uploads are most of it, what concerns everything is rare.
		n := len(actions)
		if m.rng.IntN(10) > 0 {
			n = 7
		}
		actions[m.rng.IntN(n)]()
		if t.Failed() {
			break
		}
	}
	m.compare()
	m.reopen()
	m.compare()
	storetest.Check(t, m.s)
	if err := m.s.Close(); err != nil {
		t.Fatal(err)
	}
}

func (m *model) open() {
	s, err := store.Open(m.dir, store.Config{})
	if err != nil {
		m.t.Fatal(err)
	}
	m.s = s
}

func (m *model) reopen() {
	if err := m.s.Close(); err != nil {
		m.t.Fatal(err)
	}
	m.open()
}

func (m *model) addAccount() {
	m.names++
	a, err := m.s.AddAccount(ctx, fmt.Sprintf("account-%d", m.names))
	if err != nil {
		m.t.Fatal(err)
	}
	m.views[a.ID] = make(map[nixproto.StorePath]*nixproto.PathInfo)
}

// account removes an account or adds one.
func (m *model) account() {
	if len(m.views) < 3 {
		m.addAccount()
		return
	}
	a, _ := m.pick()
	if err := m.s.RemoveAccount(ctx, a); err != nil {
		m.t.Fatal(err)
	}
	delete(m.views, a)
	if _, err := m.s.All(ctx, a); !errors.Is(err, store.ErrNotFound) {
		m.t.Errorf("a removed account has a view: %v", err)
	}
}

// pick returns some account and its view.
func (m *model) pick() (store.AccountID, map[nixproto.StorePath]*nixproto.PathInfo) {
	ids := slices.Sorted(maps.Keys(m.views))
	a := ids[m.rng.IntN(len(ids))]
	return a, m.views[a]
}

// some returns up to n paths of a view.
func (m *model) some(view map[nixproto.StorePath]*nixproto.PathInfo, n int) []nixproto.StorePath {
	all := slices.Sorted(maps.Keys(view))
	m.rng.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all[:min(len(all), m.rng.IntN(n+1))]
}

// path makes up a path that refers to refs. There are few of them, so that they
// meet again with other content and in other views.
func (m *model) path(refs []nixproto.StorePath) (*nixproto.PathInfo, []byte) {
	seed := m.rng.IntN(40)
	size := m.rng.IntN(3000)
	if seed%8 == 0 {
		size += 64 << 10
	}
	nar := big(uint64(seed*4+m.rng.IntN(2)), size/100*100)
	info := storetest.Unsigned(fmt.Sprint(seed), "model", nar, refs...)
	// Higher seeds refer to lower ones, so that there is no cycle.
	info.References = slices.DeleteFunc(info.References, func(r nixproto.StorePath) bool {
		return r == info.Path || !m.lower(r, seed)
	})
	m.nars[info.NarHash] = nar
	return info, nar
}

// lower reports whether a path was made of a seed below n.
func (m *model) lower(p nixproto.StorePath, n int) bool {
	for i := range n {
		if storetest.Unsigned(fmt.Sprint(i), "model", nil).Path == p {
			return true
		}
	}
	return false
}

// upload uploads a burst, now and then without committing it, or as a repair.
func (m *model) upload() {
	a, view := m.pick()
	repair := m.rng.IntN(8) == 0
	u, err := m.s.NewUpload(ctx, a, store.UploadOptions{Repair: repair})
	if err != nil {
		m.t.Fatal(err)
	}
	defer u.Abort()
	added := maps.Clone(view)
	for range 1 + m.rng.IntN(5) {
		info, nar := m.path(m.some(added, 3))
		if err := u.Add(info, bytes.NewReader(nar)); err != nil {
			m.t.Fatal(err)
		}
		_, inBurst := added[info.Path]
		if _, ok := view[info.Path]; ok && repair && added[info.Path] == view[info.Path] {
			inBurst = false
		}
		if !inBurst {
			added[info.Path] = info
		}
	}
	if m.rng.IntN(5) == 0 {
		return
	}
	if err := u.Commit(); err != nil {
		m.t.Fatal(err)
	}
	m.views[a] = added
}

// register registers two staged NARs, and a third path with content that is
// stored already.
func (m *model) register() {
	a, view := m.pick()
	var regs []store.Registration
	added := maps.Clone(view)
	add := func(info *nixproto.PathInfo, st *store.Staged) {
		if slices.ContainsFunc(regs, func(r store.Registration) bool { return r.Info.Path == info.Path }) {
			if st != nil {
				st.Discard()
			}
			return
		}
		regs = append(regs, store.Registration{Info: *info, Staged: st})
		if _, ok := added[info.Path]; !ok {
			added[info.Path] = info
		}
	}
	for range 2 {
		info, nar := m.path(m.some(view, 2))
		st, err := m.s.Stage(ctx, a)
		if err != nil {
			m.t.Fatal(err)
		}
		if _, err := st.Write(nar); err != nil {
			m.t.Fatal(err)
		}
		if err := st.Finish(); err != nil {
			m.t.Fatal(err)
		}
		got := make([]byte, len(nar))
		if n, err := st.ReadAt(got, 0); n != len(nar) || err != nil || !bytes.Equal(got, nar) {
			m.t.Errorf("staged NAR reads as something else: %d bytes of %d, %v", n, len(nar), err)
		}
		add(info, st)
	}
	if _, other := m.pick(); len(other) > 0 {
		p := other[slices.Sorted(maps.Keys(other))[0]]
		info, _ := m.path(nil)
		info.NarHash, info.NarSize = p.NarHash, p.NarSize
		add(info, nil)
	}
	if err := m.s.Register(ctx, a, regs); err != nil {
		m.t.Fatal(err)
	}
	m.views[a] = added
}

// referrers returns the paths of a view that refer to p, but for itself.
func referrers(view map[nixproto.StorePath]*nixproto.PathInfo, p nixproto.StorePath) (list []nixproto.StorePath) {
	for q, info := range view {
		if q != p && slices.Contains(info.References, p) {
			list = append(list, q)
		}
	}
	slices.Sort(list)
	return list
}

// delete deletes paths, some of them leased or referred to.
func (m *model) delete() {
	a, view := m.pick()
	paths := m.some(view, 4)
	lease := m.s.NewLease(a)
	defer lease.Release()
	leased := m.some(view, 1)
	lease.Add(leased...)
	refused := len(paths) > 0 && slices.ContainsFunc(paths, func(p nixproto.StorePath) bool {
		outside := func(q nixproto.StorePath) bool { return !slices.Contains(paths, q) }
		return slices.Contains(leased, p) || slices.ContainsFunc(referrers(view, p), outside)
	})
	_, err := m.s.Delete(ctx, a, paths...)
	if refused != errors.Is(err, store.ErrInUse) || !refused && err != nil {
		m.t.Errorf("delete of %q: %v, but in use is %v", paths, err, refused)
	}
	if err == nil {
		for _, p := range paths {
			delete(view, p)
		}
	}
}

// gc collects a view but for what is leased.
func (m *model) gc() {
	a, view := m.pick()
	lease := m.s.NewLease(a)
	defer lease.Release()
	keep := m.some(view, 5)
	lease.Add(keep...)
	alive := make(map[nixproto.StorePath]bool)
	for len(keep) > 0 {
		p := keep[0]
		keep = keep[1:]
		if !alive[p] {
			alive[p] = true
			keep = append(keep, view[p].References...)
		}
	}
	res, err := m.s.GC(ctx, a, store.GCOptions{})
	if err != nil {
		m.t.Fatal(err)
	}
	var want []nixproto.StorePath
	for p := range view {
		if !alive[p] {
			want = append(want, p)
			delete(view, p)
		}
	}
	slices.Sort(want)
	if diff := cmp.Diff(want, slices.Sorted(slices.Values(res.Paths))); diff != "" {
		m.t.Errorf("collected: %s", diff)
	}
}

// sweep sweeps, and compares the blobs that are left.
func (m *model) sweep() {
	if _, err := m.s.Sweep(ctx); err != nil {
		m.t.Fatal(err)
	}
	used := make(map[nixproto.Hash]bool)
	for _, view := range m.views {
		for _, info := range view {
			used[info.NarHash] = true
		}
	}
	for h := range m.nars {
		if ok, err := m.s.HasBlob(ctx, h); err != nil || ok != used[h] {
			m.t.Errorf("blob %s is stored: %v, used: %v, %v", h, ok, used[h], err)
		}
	}
}

// sign adds a signature to a path.
func (m *model) sign() {
	a, view := m.pick()
	for _, p := range m.some(view, 1) {
		sig := fmt.Sprintf("key-%d:AAAA", m.rng.IntN(3))
		if err := m.s.AddSignatures(ctx, a, p, []string{sig}); err != nil {
			m.t.Fatal(err)
		}
		info := *view[p]
		info.Signatures = slices.Compact(slices.Sorted(slices.Values(append(slices.Clone(info.Signatures), sig))))
		view[p] = &info
	}
}

// compare compares all views with the store.
func (m *model) compare() {
	for a, view := range m.views {
		all, err := m.s.All(ctx, a)
		if err != nil {
			m.t.Fatal(err)
		}
		if diff := cmp.Diff(slices.Sorted(maps.Keys(view)), all); diff != "" {
			m.t.Errorf("account %d: %s", a, diff)
			continue
		}
		for p, want := range view {
			m.compareInfo(a, p, want)
			got, err := m.s.Referrers(ctx, a, p)
			if diff := cmp.Diff(referrers(view, p), got); diff != "" || err != nil {
				m.t.Errorf("referrers of %s: %s %v", p, diff, err)
			}
			if by, err := m.s.ByHashPart(ctx, a, p.HashPart()); by != p || err != nil {
				m.t.Errorf("by hash part of %s: %s, %v", p, by, err)
			}
		}
		m.compareClosure(a, view)
	}
}

func (m *model) compareInfo(a store.AccountID, p nixproto.StorePath, want *nixproto.PathInfo) {
	got, err := m.s.Info(ctx, a, p)
	if err != nil {
		m.t.Error(err)
		return
	}
	if got.NarHash != want.NarHash || got.NarSize != want.NarSize ||
		!slices.Equal(got.References, want.References) || !slices.Equal(got.Signatures, want.Signatures) {
		m.t.Errorf("info of %s is %+v, want %+v", p, got, want)
	}
	if m.rng.IntN(10) == 0 && !bytes.Equal(content(m.t, m.s, a, p), m.nars[want.NarHash]) {
		m.t.Errorf("content of %s is another", p)
	}
}

// compareClosure wants each path of a closure after those it refers to.
func (m *model) compareClosure(a store.AccountID, view map[nixproto.StorePath]*nixproto.PathInfo) {
	roots := m.some(view, 3)
	closure, err := m.s.Closure(ctx, a, roots)
	if err != nil {
		m.t.Error(err)
	}
	seen := make(map[nixproto.StorePath]bool)
	for _, p := range closure {
		for _, ref := range view[p].References {
			if !seen[ref] && ref != p {
				m.t.Errorf("%s comes before its reference %s", p, ref)
			}
		}
		seen[p] = true
	}
	for _, p := range roots {
		if !seen[p] {
			m.t.Errorf("%s is missing in its closure", p)
		}
	}
}
