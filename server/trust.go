package server

import (
	"cmp"
	"slices"
	"strings"
	"sync"

	"nbd/nixproto"
	"nbd/store"
)

// trusts knows which accounts are linked and who offers what, as all accounts'
// settings say it. It is computed anew when any of them changes.
type trusts struct {
	book *settingsBook

	mu sync.Mutex // guards what follows
	of *store.Settings
	// linked are the accounts that an account trusts and that trust it.
	linked map[store.AccountID][]store.AccountID
	// offers are those of all accounts, by the name of the key.
	offers map[string][]keyOffer
}

// A keyOffer is that an account lets others use what a key signed.
type keyOffer struct {
	account store.AccountID
	key     string // "<name>", or "<name>:<base64>" for one key of that name
}

// covers reports whether the offer is of what k signed.
func (o *keyOffer) covers(k nixproto.PublicKey) bool { return o.key == k.Name || o.key == k.String() }

// trust returns what an account may use of others' now, if signatures by keys
// count for it.
func (t *trusts) trust(a store.AccountID, keys []nixproto.PublicKey) store.Trust {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.refreshLocked()
	offered := make(map[store.AccountID][]nixproto.PublicKey)
	for _, k := range keys {
		for _, o := range t.offers[k.Name] {
			if o.account != a && o.covers(k) && !slices.Contains(offered[o.account], k) {
				offered[o.account] = append(offered[o.account], k)
			}
		}
	}
	trust := store.Trust{Linked: t.linked[a], Keys: keys}
	for account, keys := range offered {
		trust.Offers = append(trust.Offers, store.Offer{Account: account, Keys: keys})
	}
	slices.SortFunc(trust.Offers, func(x, y store.Offer) int { return cmp.Compare(x.Account, y.Account) })
	return trust
}

func (t *trusts) refreshLocked() {
	version := t.book.version()
	if t.of == version {
		return
	}
	all := t.book.all()
	slices.SortFunc(all, func(x, y accountSettings) int { return cmp.Compare(x.Account.ID, y.Account.ID) })
	wishes := make(map[string][]string, len(all)) // by name, names
	for _, a := range all {
		wishes[a.Account.Name] = a.Settings.TrustedAccounts
	}
	t.linked = make(map[store.AccountID][]store.AccountID)
	t.offers = make(map[string][]keyOffer)
	ids := make(map[string]store.AccountID, len(all))
	for _, a := range all {
		ids[a.Account.Name] = a.Account.ID
	}
	for _, a := range all {
		for _, name := range a.Settings.TrustedAccounts {
			if id, ok := ids[name]; ok && id != a.Account.ID && slices.Contains(wishes[name], a.Account.Name) {
				t.linked[a.Account.ID] = append(t.linked[a.Account.ID], id)
			}
		}
		slices.Sort(t.linked[a.Account.ID])
		for _, key := range a.Settings.OfferSigned {
			name, _, _ := strings.Cut(key, ":")
			t.offers[name] = append(t.offers[name], keyOffer{a.Account.ID, key})
		}
	}
	t.of = version
}

// restrictSight takes from a session what others do not let its account use any
// more. It is called between two requests.
func (ss *session) restrictSight() {
	now := ss.server.book.version()
	if ss.trust == now || ss.Sight == nil {
		return
	}
	ss.trust = now
	ss.Sight.Restrict(ss.server.trusts.trust(ss.account(), ss.Settings.TrustedPublicKeys))
}

// newSight returns what an account may use now, if signatures by keys count for
// it. A session and its builds keep to it until they end, as far as the others
// stand by it (restrictSight).
func (s *Server) newSight(a store.AccountID, keys []nixproto.PublicKey) *store.Sight {
	return s.store.NewSight(a, s.trusts.trust(a, keys))
}
