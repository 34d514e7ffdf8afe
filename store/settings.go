package store

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"maps"
	"slices"

	bolt "go.etcd.io/bbolt"
)

// A SettingsOwner is who settings are stored for: a key if it has one, else an
// account, else, as the zero value, the system.
type SettingsOwner struct {
	Account AccountID
	// Key is the fingerprint of a key of the account.
	Key string
}

// Settings are all stored settings at one moment: texts by name, which the store
// does not look into. Nothing in it changes, and none of it is to be written
// to. The maps of an owner stay the same values from one Settings to the next as
// long as nothing is changed there.
type Settings struct {
	System   map[string]string
	Accounts map[AccountID]*AccountSettings
}

// AccountSettings are the stored settings of one account and its keys.
type AccountSettings struct {
	Account Account
	Values  map[string]string
	Keys    map[string]map[string]string // by fingerprint; only those with settings
}

// Of returns the values stored for an owner; nil if there are none.
func (s *Settings) Of(o SettingsOwner) map[string]string {
	if o.Account == 0 {
		return s.System
	}
	a := s.Accounts[o.Account]
	switch {
	case a == nil:
		return nil
	case o.Key != "":
		return a.Keys[o.Key]
	}
	return a.Values
}

// Settings returns what is stored now. It costs a look at memory.
func (s *Store) Settings() *Settings { return s.settings.Load() }

// ChangeSettings replaces the settings of owners by what change makes of them, in
// one transaction: all are durable and seen by Settings when it returns, or
// nothing is changed. Change is given copies, in the order of owners, and
// writes to them. An owner that does not exist is ErrNotFound.
func (s *Store) ChangeSettings(ctx context.Context, owners []SettingsOwner, change func(values []map[string]string) error) error {
	err := s.updateSettings(func(tx *bolt.Tx, next *Settings) error {
		values := make([]map[string]string, len(owners))
		for i, o := range owners {
			if err := checkOwner(tx, o); err != nil {
				return err
			}
			values[i] = maps.Clone(next.Of(o))
			if values[i] == nil {
				values[i] = map[string]string{}
			}
		}
		if err := change(values); err != nil {
			return err
		}
		for i, o := range owners {
			if err := putSettings(tx, o, values[i]); err != nil {
				return err
			}
			next.put(o, values[i])
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("change settings: %w", err)
	}
	return nil
}

// updateSettings runs f in a transaction with a copy of the settings, which is
// published if f has no error.
func (s *Store) updateSettings(f func(tx *bolt.Tx, next *Settings) error) error {
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	if s.closed {
		return ErrClosed
	}
	old := s.settings.Load()
	next := &Settings{System: old.System, Accounts: maps.Clone(old.Accounts)}
	if err := s.updateLocked(func(tx *bolt.Tx) error { return f(tx, next) }); err != nil {
		return err
	}
	s.settings.Store(next)
	return nil
}

// put sets the values of an owner in a copy.
func (s *Settings) put(o SettingsOwner, values map[string]string) {
	if o.Account == 0 {
		s.System = values
		return
	}
	a := *s.Accounts[o.Account]
	if o.Key == "" {
		a.Values = values
	} else {
		a.Keys = maps.Clone(a.Keys)
		if a.Keys == nil {
			a.Keys = map[string]map[string]string{}
		}
		a.Keys[o.Key] = values
		if len(values) == 0 {
			delete(a.Keys, o.Key)
		}
	}
	s.Accounts[o.Account] = &a
}

// checkOwner returns ErrNotFound for an account or key that is not there.
func checkOwner(tx *bolt.Tx, o SettingsOwner) error {
	if o.Account == 0 {
		return nil
	}
	if _, err := getAccount(tx, o.Account); err != nil || o.Key == "" {
		return err
	}
	h, ok := parseFingerprint(o.Key)
	var rec keyRecord
	if ok {
		var err error
		if ok, err = getJSON(tx.Bucket(bucketKeys), h, &rec); err != nil {
			return err
		}
	}
	if !ok || rec.Account != o.Account {
		return fmt.Errorf("key %q: %w", o.Key, ErrNotFound)
	}
	return nil
}

// settingsKey is the key of an owner's values in the database: nothing, the
// account's id, or that and the SHA-256 of a key; before each a letter.
func settingsKey(o SettingsOwner) []byte {
	switch {
	case o.Account == 0:
		return []byte("s")
	case o.Key == "":
		return append([]byte("a"), idKey(uint64(o.Account))...)
	}
	h, _ := parseFingerprint(o.Key) // checkOwner has found it
	return append(append([]byte("k"), idKey(uint64(o.Account))...), h...)
}

func putSettings(tx *bolt.Tx, o SettingsOwner, values map[string]string) error {
	b := tx.Bucket(bucketSettings)
	if len(values) == 0 {
		return b.Delete(settingsKey(o))
	}
	return putJSON(b, settingsKey(o), values)
}

// loadSettings reads all settings, when the store is opened.
func loadSettings(tx *bolt.Tx) (*Settings, error) {
	all := &Settings{Accounts: map[AccountID]*AccountSettings{}}
	err := tx.Bucket(bucketAccounts).ForEach(func(k, v []byte) error {
		var rec accountRecord
		if err := decodeJSON(v, &rec); err != nil {
			return err
		}
		if id := AccountID(keyID(k)); rec.Removed.IsZero() {
			all.Accounts[id] = &AccountSettings{Account: rec.account(id)}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	err = tx.Bucket(bucketSettings).ForEach(func(k, v []byte) error {
		values := map[string]string{}
		if err := decodeJSON(v, &values); err != nil {
			return err
		}
		o, ok := settingsOwner(k)
		if !ok || o.Account != 0 && all.Accounts[o.Account] == nil {
			return fmt.Errorf("settings: %w: no owner", ErrDamaged)
		}
		all.put(o, values)
		return nil
	})
	return all, err
}

// settingsOwner is the reverse of settingsKey.
func settingsOwner(k []byte) (o SettingsOwner, ok bool) {
	const account, key = 1 + 8, 1 + 8 + sha256.Size
	switch {
	case string(k) == "s":
		return o, true
	case len(k) == account && k[0] == 'a':
		return SettingsOwner{Account: AccountID(keyID(k[1:]))}, true
	case len(k) == key && k[0] == 'k':
		return SettingsOwner{AccountID(keyID(k[1:account])), fingerprintPrefix + base64.RawStdEncoding.EncodeToString(k[account:])}, true
	}
	return o, false
}

// addAccount makes room for a new account.
func (s *Settings) addAccount(a Account) { s.Accounts[a.ID] = &AccountSettings{Account: a} }

// removeAccountSettings ends the settings of an account and of its keys.
func removeAccountSettings(tx *bolt.Tx, next *Settings, a AccountID) error {
	acc := next.Accounts[a]
	delete(next.Accounts, a)
	if acc == nil {
		return nil
	}
	owners := []SettingsOwner{{Account: a}}
	for _, print := range slices.Sorted(maps.Keys(acc.Keys)) {
		owners = append(owners, SettingsOwner{a, print})
	}
	for _, o := range owners {
		if err := tx.Bucket(bucketSettings).Delete(settingsKey(o)); err != nil {
			return err
		}
	}
	return nil
}
