#!/bin/sh
# The system below a bundle, in the folder ROOT: Debian's C library, Python and its standard library, and nothing that could
# install more; about 60 MB. Needs apt-get and dpkg-deb, runs none of what it unpacks, so ARCH may be another machine's.
#
#   minimal-base.sh amd64|arm64 ROOT [PACKAGE…]
set -eu
umask 022
arch=$1 root=$2
shift 2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/archives/partial" "$root"
: > "$work/status"
apt() {
  apt-get --quiet=2 -o APT::Architecture="$arch" -o APT::Architectures="$arch" -o APT::Install-Recommends=false \
    -o Dir::State::lists="$work/lists" -o Dir::State::status="$work/status" -o Dir::Cache="$work" \
    -o Dir::Cache::archives="$work/archives" -o pkgCacheGen::ForceEssential=none -o APT::Sandbox::User=root \
    -o Debug::NoLocking=true "$@"
}
apt update
apt --download-only --yes install python3-minimal libpython3-stdlib "$@" > /dev/null
# As Debian has it since 12: /bin and its like are links.
for name in bin sbin lib lib64; do
  mkdir -p "$root/usr/$name"
  ln -sfn "usr/$name" "$root/$name"
done
mkdir -p "$root/etc" "$root/tmp" "$root/var/lib/dpkg/status.d"
chmod 1777 "$root/tmp"
for archive in "$work"/archives/*.deb; do
  name=$(dpkg-deb --field "$archive" Package)
  case $name in dpkg | tar | readline-common | media-types | libtirpc-common) continue ;; esac
  dpkg-deb --extract "$archive" "$root"
  # Where scanners for known vulnerabilities look in images that have no dpkg.
  dpkg-deb --field "$archive" > "$root/var/lib/dpkg/status.d/$name"
done
echo 'root:x:0:0:root:/root:/usr/sbin/nologin
nonroot:x:65532:65532:nonroot:/tmp:/usr/sbin/nologin' > "$root/etc/passwd"
echo 'root:x:0:
nonroot:x:65532:' > "$root/etc/group"
echo 'hosts: files dns' > "$root/etc/nsswitch.conf"
rm -rf "$root/usr/share/man" "$root/usr/share/lintian" "$root/usr/share/locale" "$root/usr/share/bash-completion"
