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

// A sightModel is what accounts should be able to use: their own views, and
// what they lend each other.
type sightModel struct {
	t        *testing.T
	rng      *rand.Rand
	dir      string
	s        *store.Store
	names    int
	keys     []nixproto.SigningKey // the first one is public
	accounts map[store.AccountID]*modelAccount
	sessions []*modelSession
}

type modelAccount struct {
	own    map[nixproto.StorePath]*nixproto.PathInfo
	links  map[store.AccountID]bool // this side's wish
	trusts map[int]bool             // keys
	offers map[int]bool
}

// A modelSession is a Sight that holds to what it has seen of others.
type modelSession struct {
	account store.AccountID
	sight   *store.Sight
	lease   *store.Lease
	seen    map[nixproto.StorePath]nixproto.Hash
}

// TestSightModel lets accounts link, offer, sign, upload, delete and vanish at
// random, and compares what each can use with a model of the rules. Nobody
// sees content that the model says he may not.
func TestSightModel(t *testing.T) {
	steps := 1200
	if testing.Short() {
		steps = 250
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	m := &sightModel{t: t, rng: rand.New(rand.NewPCG(seed, 0)), dir: t.TempDir(), accounts: make(map[store.AccountID]*modelAccount)}
	for i := range 3 {
		m.keys = append(m.keys, signingKey(t, fmt.Sprint("key-", i)))
	}
	m.open()
	for range 4 {
		m.addAccount()
	}
	often := []func(){m.upload, m.upload, m.upload, m.upload, m.delete, m.sign, m.change, m.change, m.session, m.compareOne}
	rare := []func(){m.reopen, m.removeAccount, m.sweep, m.compare, m.endSessions}
	for range steps {
		if m.rng.IntN(12) > 0 {
			often[m.rng.IntN(len(often))]()
		} else {
			rare[m.rng.IntN(len(rare))]()
		}
		if t.Failed() {
			break
		}
	}
	m.compare()
	m.reopen()
	m.compare()
	storetest.Check(t, m.s)
	m.endSessions()
	if err := m.s.Close(); err != nil {
		t.Fatal(err)
	}
}

func (m *sightModel) open() {
	s, err := store.Open(m.dir, store.Config{PublicKeys: []nixproto.PublicKey{m.keys[0].Public()}})
	if err != nil {
		m.t.Fatal(err)
	}
	m.s = s
}

func (m *sightModel) reopen() {
	m.endSessions()
	if err := m.s.Close(); err != nil {
		m.t.Fatal(err)
	}
	m.open()
}

func (m *sightModel) sweep() {
	if _, err := m.s.Sweep(ctx); err != nil {
		m.t.Fatal(err)
	}
}

func (m *sightModel) addAccount() {
	m.names++
	a, err := m.s.AddAccount(ctx, fmt.Sprintf("account-%d", m.names))
	if err != nil {
		m.t.Fatal(err)
	}
	m.accounts[a.ID] = &modelAccount{
		make(map[nixproto.StorePath]*nixproto.PathInfo), make(map[store.AccountID]bool), make(map[int]bool), make(map[int]bool),
	}
}

func (m *sightModel) removeAccount() {
	a := m.pick()
	if err := m.s.RemoveAccount(ctx, a); err != nil {
		m.t.Fatal(err)
	}
	delete(m.accounts, a)
	for _, s := range m.sessions { // what was chosen may have been its
		clear(s.seen)
	}
	m.addAccount()
}

func (m *sightModel) ids() []store.AccountID { return slices.Sorted(maps.Keys(m.accounts)) }

func (m *sightModel) pick() store.AccountID {
	ids := m.ids()
	return ids[m.rng.IntN(len(ids))]
}

// modelPaths is how many paths there are.
const modelPaths = 16

func modelPath(i int) nixproto.StorePath { return storetest.Unsigned(fmt.Sprint(i), "p", nil).Path }

// change changes what an account wishes.
func (m *sightModel) change() {
	a := m.accounts[m.pick()]
	flip := func(set map[int]bool, k int) { set[k] = !set[k] }
	switch m.rng.IntN(3) {
	case 0:
		b := m.pick()
		a.links[b] = !a.links[b]
	case 1:
		flip(a.trusts, m.rng.IntN(len(m.keys)))
	default:
		flip(a.offers, m.rng.IntN(len(m.keys)))
	}
}

// trust is what the server would make of everybody's wishes.
func (m *sightModel) trust(id store.AccountID) store.Trust {
	a := m.accounts[id]
	var t store.Trust
	for _, b := range m.ids() {
		if b == id {
			continue
		}
		if a.links[b] && m.accounts[b].links[id] {
			t.Linked = append(t.Linked, b)
		}
		var keys []nixproto.PublicKey
		for i, k := range m.keys {
			if m.accounts[b].offers[i] {
				keys = append(keys, k.Public())
			}
		}
		if len(keys) > 0 {
			t.Offers = append(t.Offers, store.Offer{Account: b, Keys: keys})
		}
	}
	for i, k := range m.keys {
		if a.trusts[i] {
			t.Keys = append(t.Keys, k.Public())
		}
	}
	return t
}

// signers returns the numbers of the keys that signed a record.
func (m *sightModel) signers(info *nixproto.PathInfo) (signers []int) {
	for i, k := range m.keys {
		if slices.Contains(info.Signatures, k.Sign(info.Fingerprint())) {
			signers = append(signers, i)
		}
	}
	return signers
}

// usable returns what an account may use for a path, by the rules; nil if that
// is nothing.
func (m *sightModel) usable(id store.AccountID, p nixproto.StorePath) *nixproto.PathInfo {
	a := m.accounts[id]
	if own := a.own[p]; own != nil {
		return own
	}
	var candidates []*nixproto.PathInfo
	for _, b := range m.ids() {
		if b != id && a.links[b] && m.accounts[b].links[id] && m.accounts[b].own[p] != nil {
			candidates = append(candidates, m.accounts[b].own[p])
		}
	}
	signed := func(b store.AccountID, by func(key int) bool) {
		info := m.accounts[b].own[p]
		if b == id || info == nil || !slices.ContainsFunc(m.signers(info), func(k int) bool { return a.trusts[k] && by(k) }) {
			return
		}
		lent := *info
		lent.Signatures = nil
		for _, k := range m.signers(info) {
			if a.trusts[k] {
				lent.Signatures = append(lent.Signatures, m.keys[k].Sign(info.Fingerprint()))
			}
		}
		slices.Sort(lent.Signatures)
		candidates = append(candidates, &lent)
	}
	for _, b := range m.ids() {
		signed(b, func(k int) bool { return k == 0 })
	}
	for _, b := range m.ids() {
		signed(b, func(k int) bool { return m.accounts[b].offers[k] })
	}
	for _, c := range candidates {
		if !slices.ContainsFunc(c.References, func(r nixproto.StorePath) bool { return r != p && m.usable(id, r) == nil }) {
			return c
		}
	}
	return nil
}

// adopt takes a path and its closure into an own view.
func (m *sightModel) adopt(id store.AccountID, p nixproto.StorePath) {
	a := m.accounts[id]
	if a.own[p] != nil {
		return
	}
	info := m.usable(id, p)
	for _, r := range info.References {
		if r != p {
			m.adopt(id, r)
		}
	}
	a.own[p] = info
}

// upload uploads one to three paths that refer to what there is, or is not.
func (m *sightModel) upload() {
	id := m.pick()
	a := m.accounts[id]
	u, err := m.s.NewSight(id, m.trust(id)).NewUpload(ctx, store.UploadOptions{})
	if err != nil {
		m.t.Fatal(err)
	}
	defer u.Abort()
	before := maps.Clone(a.own)
	for range 1 + m.rng.IntN(3) {
		i := m.rng.IntN(modelPaths)
		nar := storetest.File(fmt.Sprint("content ", i, m.rng.IntN(3)), false)
		var refs []nixproto.StorePath
		for range m.rng.IntN(3) {
			if i > 0 {
				refs = append(refs, modelPath(m.rng.IntN(i)))
			}
		}
		if m.rng.IntN(4) == 0 {
			refs = append(refs, modelPath(i))
		}
		slices.Sort(refs)
		info := storetest.Unsigned(fmt.Sprint(i), "p", nar, slices.Compact(refs)...)
		for _, k := range m.keys {
			if m.rng.IntN(3) == 0 {
				info.Sign(k)
			}
		}
		if m.rng.IntN(6) == 0 { // a signature of something else
			other := *info
			other.NarSize++
			info.Signatures = append(info.Signatures, m.keys[m.rng.IntN(3)].Sign(other.Fingerprint()))
		}
		slices.Sort(info.Signatures)
		refused := slices.ContainsFunc(info.References, func(r nixproto.StorePath) bool { return r != info.Path && m.usable(id, r) == nil })
		err := u.Add(info, bytes.NewReader(nar))
		if refused != errors.Is(err, store.ErrInvalid) || !refused && err != nil {
			m.t.Errorf("upload of %s with %q: %v, refused by the model: %v", info.Path, info.References, err, refused)
			return
		}
		if refused || a.own[info.Path] != nil {
			continue
		}
		for _, r := range info.References {
			if r != info.Path {
				m.adopt(id, r)
			}
		}
		a.own[info.Path] = info
	}
	if m.rng.IntN(6) == 0 {
		a.own = before
		return
	}
	if err := u.Commit(); err != nil {
		m.t.Fatal(err)
	}
}

// delete deletes a path, if nobody refers to it.
func (m *sightModel) delete() {
	id := m.pick()
	a := m.accounts[id]
	all := slices.Sorted(maps.Keys(a.own))
	if len(all) == 0 {
		return
	}
	p := all[m.rng.IntN(len(all))]
	_, err := m.s.Delete(ctx, id, p)
	inUse := len(referrers(a.own, p)) > 0
	sessions := slices.ContainsFunc(m.sessions, func(s *modelSession) bool { return s.account == id })
	switch {
	case err == nil && !inUse:
		delete(a.own, p)
	case errors.Is(err, store.ErrInUse) && (inUse || sessions): // what a session borrows may refer to it
	default:
		m.t.Errorf("delete %s: %v, in use: %v", p, err, inUse)
	}
}

// sign adds a signature to a path.
func (m *sightModel) sign() {
	id := m.pick()
	a := m.accounts[id]
	for _, p := range slices.Sorted(maps.Keys(a.own)) {
		if m.rng.IntN(4) > 0 {
			continue
		}
		info := *a.own[p]
		sig := m.keys[m.rng.IntN(len(m.keys))].Sign(info.Fingerprint())
		if err := m.s.AddSignatures(ctx, id, p, []string{sig}); err != nil {
			m.t.Fatal(err)
		}
		info.Signatures = slices.Compact(slices.Sorted(slices.Values(append(slices.Clone(info.Signatures), sig))))
		a.own[p] = &info
	}
}

// session begins a session, or lets one look at a path again.
func (m *sightModel) session() {
	if len(m.sessions) < 4 {
		id := m.pick()
		v := m.s.NewSight(id, m.trust(id))
		m.sessions = append(m.sessions, &modelSession{id, v, v.NewLease(), make(map[nixproto.StorePath]nixproto.Hash)})
	}
	s := m.sessions[m.rng.IntN(len(m.sessions))]
	a := m.accounts[s.account]
	if a == nil {
		return
	}
	p := modelPath(m.rng.IntN(modelPaths))
	info, err := s.sight.Info(ctx, p)
	seen, known := s.seen[p]
	switch own := a.own[p]; {
	case own != nil:
		if err != nil || info.NarHash != own.NarHash {
			m.t.Errorf("session sees %v for its own %s, %v", info, p, err)
		}
	case known:
		if err != nil || info.NarHash != seen {
			m.t.Errorf("session saw %s for %s, and now %v, %v", seen, p, info, err)
			return
		}
		if ok, err := m.s.HasBlob(ctx, seen); !ok || err != nil {
			m.t.Errorf("the content of %s, which a session uses, is gone: %v", p, err)
		}
	case err == nil:
		s.seen[p] = info.NarHash
	case !errors.Is(err, store.ErrNotFound):
		m.t.Error(err)
	}
}

func (m *sightModel) endSessions() {
	for _, s := range m.sessions {
		s.lease.Release()
	}
	m.sessions = nil
}

// compareOne compares what one account can use with the model.
func (m *sightModel) compareOne() { m.compareAccount(m.pick()) }

func (m *sightModel) compare() {
	for _, id := range m.ids() {
		m.compareAccount(id)
		own, err := m.s.All(ctx, id)
		if diff := cmp.Diff(slices.Sorted(maps.Keys(m.accounts[id].own)), own); diff != "" || err != nil {
			m.t.Errorf("own view of %d: %s %v", id, diff, err)
		}
	}
}

func (m *sightModel) compareAccount(id store.AccountID) {
	v := m.s.NewSight(id, m.trust(id))
	if m.rng.IntN(2) == 0 {
		lease := v.NewLease()
		defer lease.Release()
	}
	var all, want []nixproto.StorePath
	for i := range modelPaths {
		all = append(all, modelPath(i))
	}
	m.rng.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	for _, p := range all {
		info := m.usable(id, p)
		got, err := v.Info(ctx, p)
		switch {
		case info == nil:
			if !errors.Is(err, store.ErrNotFound) {
				m.t.Errorf("account %d sees %s: %+v, %v", id, p, got, err)
			}
			continue
		case err != nil || got.NarHash != info.NarHash || !slices.Equal(got.References, info.References) || !slices.Equal(got.Signatures, info.Signatures):
			m.t.Errorf("account %d sees %+v for %s, want %+v, %v", id, got, p, info, err)
		}
		want = append(want, p)
	}
	valid, err := v.Valid(ctx, all)
	if diff := cmp.Diff(want, valid); diff != "" && len(want)+len(valid) > 0 || err != nil {
		m.t.Errorf("valid for account %d: %s %v", id, diff, err)
	}
	if len(want) > 0 {
		(&lending{t: m.t, s: m.s}).checkRoots(v, want[:1+m.rng.IntN(len(want))]...)
	}
}
