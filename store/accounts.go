package store

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	bolt "go.etcd.io/bbolt"

	"nbd/nixproto"
)

// An AccountID identifies an account and its view of the store. Ids begin at 1
// and are never used again.
type AccountID uint64

// An Account owns keys, a view of the store, and builds.
type Account struct {
	ID   AccountID
	Name string
	// Created is when the account was made.
	Created time.Time
	// PublicKey is the public half of the key that signs what the account
	// builds, "<server name>/<account>-1:<base64>".
	PublicKey string
}

// An accountRecord is the value of an account in the database. Those of
// removed accounts stay, without key.
type accountRecord struct {
	Name       string    `json:"name"`
	Created    time.Time `json:"created"`
	Removed    time.Time `json:"removed,omitzero"`
	SigningKey string    `json:"signingKey,omitempty"` // the secret half
	PublicKey  string    `json:"publicKey"`
}

func (r *accountRecord) account(id AccountID) Account {
	return Account{ID: id, Name: r.Name, Created: r.Created, PublicKey: r.PublicKey}
}

// CheckAccountName reports why name cannot be that of an account: it is 1 to 64
// characters of [a-z0-9._-] and begins with a letter or digit.
func CheckAccountName(name string) error {
	if name == "" || len(name) > 64 {
		return errors.New("an account name has 1 to 64 characters")
	}
	for i, c := range []byte(name) {
		word := c >= 'a' && c <= 'z' || c >= '0' && c <= '9'
		if !word && (i == 0 || c != '.' && c != '_' && c != '-') {
			return fmt.Errorf("account name %q: only a-z, 0-9 and, not at the beginning, . _ - may be in it", name)
		}
	}
	return nil
}

// AddAccount makes an account with its signing key and first keys. A name that
// was ever used, or a key that any account has, is ErrExists; a bad name or key
// is ErrInvalid.
func (s *Store) AddAccount(ctx context.Context, name string, keys ...Key) (Account, error) {
	a, err := s.addAccount(name, keys)
	if err != nil {
		return Account{}, fmt.Errorf("add account %q: %w", name, err)
	}
	return a, nil
}

func (s *Store) addAccount(name string, keys []Key) (a Account, err error) {
	if err := CheckAccountName(name); err != nil {
		return a, fmt.Errorf("%w name: %w", ErrInvalid, err)
	}
	secret, err := nixproto.GenerateSigningKey(s.cfg.ServerName+"/"+name+"-1", rand.Reader)
	if err != nil {
		return a, err
	}
	rec := accountRecord{Name: name, Created: s.cfg.Now(), SigningKey: secret.Secret(), PublicKey: secret.Public().String()}
	err = s.updateSettings(func(tx *bolt.Tx, next *Settings) error {
		names := tx.Bucket(bucketNames)
		if names.Get([]byte(name)) != nil {
			return fmt.Errorf("the name %w, or belonged to an account that was removed", ErrExists)
		}
		id, err := tx.Bucket(bucketAccounts).NextSequence()
		if err != nil {
			return err
		}
		a = rec.account(AccountID(id))
		next.addAccount(a)
		if err := names.Put([]byte(name), idKey(id)); err != nil {
			return err
		}
		if err := putJSON(tx.Bucket(bucketAccounts), idKey(id), &rec); err != nil {
			return err
		}
		if err := createView(tx, a.ID); err != nil {
			return err
		}
		for _, k := range keys {
			if _, err := s.putKey(tx, a.ID, k); err != nil {
				return err
			}
		}
		return nil
	})
	return a, err
}

// RemoveAccount ends an account: its keys and tokens, its settings, its view,
// its uploaded logs, and what is known of what its runs took. Its
// builds stay on record; its id and name are not used again. ErrNotFound if
// there is no such account.
func (s *Store) RemoveAccount(ctx context.Context, a AccountID) error {
	err := s.updateSettings(func(tx *bolt.Tx, next *Settings) error {
		rec, err := getAccount(tx, a)
		if err != nil {
			return err
		}
		rec.Removed, rec.SigningKey = s.cfg.Now(), ""
		if err := putJSON(tx.Bucket(bucketAccounts), idKey(uint64(a)), rec); err != nil {
			return err
		}
		if err := errors.Join(removeKeys(tx, a), removeTokens(tx, a), removeAccountSettings(tx, next, a)); err != nil {
			return err
		}
		if err := removeRuns(tx, a); err != nil {
			return err
		}
		return tx.Bucket(bucketViews).DeleteBucket(idKey(uint64(a)))
	})
	if err != nil {
		return fmt.Errorf("remove account: %w", err)
	}
	s.removals.Add(1) // ends what others have chosen of its view
	if err := s.dropSigned(ctx, a); err != nil {
		return fmt.Errorf("remove account: remove it from the index of signed paths: %w", err)
	}
	if err := os.RemoveAll(s.drvLogDir(a)); err != nil {
		return fmt.Errorf("remove account: remove its logs: %w", err)
	}
	return nil
}

// getAccount returns the record of an account that was not removed, or
// ErrNotFound.
func getAccount(tx *bolt.Tx, a AccountID) (*accountRecord, error) {
	rec := &accountRecord{}
	ok, err := getJSON(tx.Bucket(bucketAccounts), idKey(uint64(a)), rec)
	if err != nil {
		return nil, fmt.Errorf("account %d: %w", a, err)
	}
	if !ok || !rec.Removed.IsZero() {
		return nil, fmt.Errorf("account %d: %w", a, ErrNotFound)
	}
	return rec, nil
}

// checkAccount returns ErrNotFound if there is no such account.
func (s *Store) checkAccount(a AccountID) error {
	return databaseError(s.db.View(func(tx *bolt.Tx) error {
		_, err := openView(tx, a)
		return err
	}))
}

// Accounts lists the accounts by name.
func (s *Store) Accounts(ctx context.Context) ([]Account, error) {
	var list []Account
	err := s.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketAccounts).ForEach(func(k, v []byte) error {
			var rec accountRecord
			if err := decodeJSON(v, &rec); err != nil {
				return err
			}
			if rec.Removed.IsZero() {
				list = append(list, rec.account(AccountID(keyID(k))))
			}
			return nil
		})
	})
	slices.SortFunc(list, func(a, b Account) int { return cmp.Compare(a.Name, b.Name) })
	return list, databaseError(err)
}

// AccountByName returns the account of that name, or ErrNotFound.
func (s *Store) AccountByName(ctx context.Context, name string) (a Account, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		id := keyID(tx.Bucket(bucketNames).Get([]byte(name)))
		rec, err := getAccount(tx, AccountID(id))
		if err != nil {
			return fmt.Errorf("account %q: %w", name, err)
		}
		a = rec.account(AccountID(id))
		return nil
	})
	return a, databaseError(err)
}

// AccountByID returns the account, or ErrNotFound.
func (s *Store) AccountByID(ctx context.Context, id AccountID) (a Account, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		rec, err := getAccount(tx, id)
		if err == nil {
			a = rec.account(id)
		}
		return err
	})
	return a, databaseError(err)
}

// SigningKey returns the key that signs what the account builds.
func (s *Store) SigningKey(ctx context.Context, a AccountID) (key nixproto.SigningKey, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		rec, err := getAccount(tx, a)
		if err != nil {
			return err
		}
		key, err = nixproto.ParseSigningKey(rec.SigningKey)
		if err != nil {
			return fmt.Errorf("signing key of account %d: %w: %w", a, ErrDamaged, err)
		}
		return nil
	})
	return key, databaseError(err)
}

// drvLogDir is where the logs are that an account uploaded.
func (s *Store) drvLogDir(a AccountID) string {
	return filepath.Join(s.dir, "drvlogs", strconv.FormatUint(uint64(a), 10))
}
