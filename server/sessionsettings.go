package server

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"strings"
	"sync"

	"nbd/nixproto"
	"nbd/server/settings"
	"nbd/store"
)

// A settingsBook knows the settings of all accounts as they are now. What it
// returns is computed from the store's memory, and remembered for as long as
// nothing changes there.
type settingsBook struct {
	// system is what the operator's configuration says; what is stored for the
	// system wins over it.
	system map[string]string
	stored settingsStore
	log    *slog.Logger

	mu       sync.Mutex // guards what follows
	of       *store.Settings
	base     settings.Effective // defaults and system
	accounts map[store.AccountID]rememberedSettings
}

// settingsStore is where settings are stored; *store.Store. What Settings returns
// does not change. ChangeSettings is durable when it returns, and changes nothing
// if change has an error.
type settingsStore interface {
	Settings() *store.Settings
	ChangeSettings(ctx context.Context, owners []store.SettingsOwner, change func(values []map[string]string) error) error
}

// rememberedSettings are settings of an account, and what they were made of.
type rememberedSettings struct {
	from      *store.AccountSettings
	effective settings.Effective
}

func newSettingsBook(system map[string]string, stored settingsStore, log *slog.Logger) *settingsBook {
	return &settingsBook{system: system, stored: stored, log: log}
}

// checkSystemSettings reports what is wrong with the operator's configuration.
func checkSystemSettings(system map[string]string) error {
	e, err := settings.Defaults().With(settings.Layer{Level: settings.System, Values: system})
	if err == nil && len(e.Notes) > 0 {
		err = errors.New(strings.Join(e.Notes, "; "))
	}
	return err
}

// systemSettings returns what counts where no account says more.
func (b *settingsBook) systemSettings() settings.Effective {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.refreshLocked()
	return b.base
}

// account returns the settings of an account; one that is not there has those of
// the system.
func (b *settingsBook) account(a store.AccountID) settings.Effective {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.refreshLocked()
	return b.accountLocked(a)
}

// exists reports whether there is such an account now.
func (b *settingsBook) exists(a store.AccountID) bool { return b.stored.Settings().Accounts[a] != nil }

// all returns the settings of all accounts, with the accounts themselves.
func (b *settingsBook) all() []accountSettings {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.refreshLocked()
	list := make([]accountSettings, 0, len(b.of.Accounts))
	for id, a := range b.of.Accounts {
		list = append(list, accountSettings{a.Account, b.accountLocked(id)})
	}
	return list
}

// accountSettings are an account and its settings.
type accountSettings struct {
	Account  store.Account
	Settings settings.Effective
}

// version changes whenever any settings or accounts do: it is equal only to
// itself.
func (b *settingsBook) version() *store.Settings { return b.stored.Settings() }

// client returns the settings of an account under one of its keys; those of a
// token, which has no fingerprint, are the account's.
func (b *settingsBook) client(a store.AccountID, key string) settings.Effective {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.refreshLocked()
	e := b.accountLocked(a)
	if values := b.of.Of(store.SettingsOwner{Account: a, Key: key}); key != "" && len(values) > 0 {
		e = b.with(e, settings.Layer{Level: settings.Key, Values: values})
	}
	return e
}

func (b *settingsBook) refreshLocked() {
	now := b.stored.Settings()
	if b.of == now {
		return
	}
	if b.of == nil || !maps.Equal(b.of.System, now.System) {
		values := maps.Clone(b.system)
		if values == nil {
			values = map[string]string{}
		}
		maps.Copy(values, now.System)
		b.base = b.with(settings.Defaults(), settings.Layer{Level: settings.System, Values: values})
		b.accounts = nil
	}
	if b.accounts == nil {
		b.accounts = make(map[store.AccountID]rememberedSettings)
	}
	maps.DeleteFunc(b.accounts, func(id store.AccountID, r rememberedSettings) bool { return now.Accounts[id] != r.from })
	b.of = now
}

func (b *settingsBook) accountLocked(a store.AccountID) settings.Effective {
	if r, ok := b.accounts[a]; ok {
		return r.effective
	}
	from := b.of.Accounts[a]
	if from == nil {
		return b.base
	}
	e := b.with(b.base, settings.Layer{Level: settings.Account, Values: from.Values})
	b.accounts[a] = rememberedSettings{from, e}
	return e
}

// with adds a stored level, and logs what is passed over.
func (b *settingsBook) with(e settings.Effective, l settings.Layer) settings.Effective {
	before := len(e.Notes)
	e, err := e.With(l)
	if err != nil {
		b.log.Error("cannot use settings", "level", l.Level.String(), "err", err) // stored levels have notes instead
	}
	for _, note := range e.Notes[min(before, len(e.Notes)):] {
		b.log.Warn("settings", "level", l.Level.String(), "note", note)
	}
	return e
}

// setSettings computes the session's settings from all levels down to its
// environment. Its error is for the client.
func (s *Session) setSettings() error {
	var wrong error
	s.environment, wrong = settings.FromEnvironment(s.Env)
	s.environment.AccountWrite = s.Client.Can(AccountWrite)
	e, err := s.currentSettings()
	if err != nil {
		return err
	}
	s.Settings = e
	if !e.SettingsFromSSHEnv {
		if len(s.Env) > 0 {
			s.Log.Info("settings of the environment ignored: settings-from-ssh-env is false")
		}
		return nil
	}
	if wrong != nil {
		return refusef("%v", wrong)
	}
	for _, v := range s.environment.Unknown {
		s.Log.Info("environment ignored: it names no setting", "variable", v)
	}
	return nil
}

// currentSettings returns what counts now for the session: settings that were
// changed since it began count at its next request.
func (s *Session) currentSettings() (settings.Effective, error) {
	if s.book == nil {
		return s.Settings, nil
	}
	e := s.book.client(s.Client.Account.ID, s.Client.Fingerprint)
	if !e.SettingsFromSSHEnv {
		return e, nil
	}
	l := s.environment
	l.Unknown = nil // told when the session began
	return s.with(e, l)
}

// with adds a level that the client sent.
func (s *Session) with(e settings.Effective, l settings.Layer) (settings.Effective, error) {
	e, err := e.With(l)
	if err != nil {
		return e, refusef("%v", err)
	}
	own, _, _ := strings.Cut(s.Client.Account.PublicKey, ":")
	if k := e.SigningKeyForBuilds; k != "" && k != own && e.Origin("signing-key-for-builds").Level == l.Level {
		return e, refusef("%s is %q, and the account has the key %s only", l.Variables["signing-key-for-builds"], clip(printable(k)), own)
	}
	return e, nil
}

// settingsFor returns what counts for one build: the session's settings as they
// are now, what the derivation says if it may, and what the client sent. drv may
// be nil. Its error is for the client.
func (s *Session) settingsFor(drv *nixproto.Derivation, sent Limits) (settings.Effective, error) {
	e, err := s.currentSettings()
	if err != nil {
		return e, err
	}
	if e.IsZero() {
		e = settings.Defaults()
	}
	if e.SettingsFromDrvEnv && drv != nil {
		l, err := settings.FromDerivation(drv.Env)
		if err != nil {
			return e, refusef("%v", err)
		}
		l.AccountWrite = s.Client.Can(AccountWrite)
		for _, v := range l.Unknown {
			s.Log.Info("attribute of a derivation ignored: it names no setting", "drv", drv.Name, "attribute", v)
		}
		l.Unknown = nil
		if e, err = s.with(e, l); err != nil {
			return e, err
		}
	}
	return e.WithSent(settings.Sent{Timeout: sent.Timeout, MaxSilentTime: sent.MaxSilent, MaxLogSize: sent.MaxLogSize}), nil
}

// limitsOf returns the limits among settings.
func limitsOf(e *settings.Effective) Limits {
	return Limits{Timeout: e.Timeout, MaxSilent: e.MaxSilentTime, MaxLogSize: e.MaxLogSize}
}
